"""Check the machine: its processor, an interpreter that the engines run on, and the disk."""

import os
import platform
import shutil
import subprocess
import sys

from messages import Failed, say, show

PYTHONS = ((3, 11), (3, 12))
GIB = 1 << 30
NEEDED = {"cpu": 5 * GIB, "cuda": 9 * GIB}
"""Bytes an environment takes with what it is unpacked from, by the build of torch.

That is 3.7 and 6.8 GB, and a margin.
"""


def check_machine():
    """Refuse a machine for which the engines have no CPU build.

    Raises:
        Failed: on anything but x86-64 Linux.
    """
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or machine not in ("x86_64", "AMD64"):
        raise Failed(
            f"this machine is {system} on {machine}: the engines' CPU builds that are tested here "
            "are for Linux on x86-64; "
            "elsewhere install the plugin beside an engine of your own (pip install "
            "moe-placement-plugin)"
        )


def find_python():
    """Find a supported interpreter: $PYTHON or the running one, else another one on PATH.

    Returns:
        (path, "3.11.7").

    Raises:
        Failed: when none is supported.
    """
    wanted = os.environ.get("PYTHON", "")
    own = not wanted or wanted == "python3"  # the Makefile's default, so nobody's choice
    first = shutil.which(wanted or sys.executable)
    if first is None:
        raise Failed(f"PYTHON={wanted}: there is no such program")
    candidates = [first]
    if own:
        candidates += [shutil.which(f"python{dotted(version)}") for version in PYTHONS]
    found = None
    for candidate in candidates:
        version = version_of(candidate) if candidate else None
        found = found or version
        if version and version[:2] in PYTHONS:
            if candidate != first:
                say(f"{first} is Python {dotted(found)}; taking {candidate}")
            return candidate, dotted(version)
    raise Failed(
        "{} is Python {}; the pinned engines run on {}: install one of them and give it, as in "
        "make test PYTHON=python3.12".format(
            first,
            dotted(found) if found else "that does not start",
            " or ".join(map(dotted, PYTHONS)),
        )
    )


def version_of(python):
    """Ask an interpreter for its version: a tuple of three numbers, None when it does not start."""
    call = [python, "-c", "import sys; print(*sys.version_info[:3])"]
    try:
        out = subprocess.run(call, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        return tuple(int(part) for part in out.stdout.split())
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def dotted(version):
    """Write a version tuple with dots."""
    return ".".join(map(str, version))


def check_space(parent, torch):
    """Refuse to begin on a disk that will be full.

    Raises:
        Failed: naming what is free and what is needed.
    """
    free = shutil.disk_usage(parent).free
    if free < NEEDED[torch]:
        raise Failed(
            f"{show(parent)} has {free / GIB:.1f} GB free, the environment and its downloads need "
            f"{NEEDED[torch] / GIB:.0f} GB: free some, or give another place (make test "
            "ENVS=/place)"
        )
