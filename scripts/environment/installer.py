"""Run uv, fetched into a folder of its own beside the environments.

It is given the caller's pip settings.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess

from lists import read_pins
from messages import NO_ANSWER, Failed, explain, say

UV = "uv==0.13.9"
PYTORCH_INDEX = "https://download.pytorch.org/whl/cpu"
PYTORCH_SECONDS = 5


class Uv:
    """Run uv with the caller's pip settings.

    It is fetched into a folder of its own beside the environments.
    """

    def __init__(self, python, parent):
        self.folder = os.path.join(parent, ".uv")
        with locked(self.folder + ".lock"):
            self.program = self.find() or self.fetch(python)
        self.environment, self.arguments = pip_settings()

    def find(self):
        """Find the uv of an earlier call."""
        program = os.path.join(self.folder, "bin", "uv")
        call = [program, "--version"]
        try:
            said = subprocess.run(call, stdout=subprocess.PIPE, check=True).stdout.decode()
        except (OSError, subprocess.CalledProcessError):
            return None
        return program if said.split()[1:2] == [UV.split("==")[1]] else None

    def fetch(self, python):
        """Fetch uv by pip; a uv on PATH serves where Python comes without pip.

        Raises:
            Failed: when it cannot be had.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        call = [python, "-m", "pip", "install", "--quiet", "--target", self.folder]
        call += ["--disable-pip-version-check", "--timeout", "15", "--retries", "2", UV]
        tried = subprocess.run(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        found = self.find() if tried.returncode == 0 else None
        if found:
            return found
        shutil.rmtree(self.folder, ignore_errors=True)
        text = tried.stdout.decode(errors="replace")
        other = shutil.which("uv")
        if "No module named pip" in text:
            if other:
                return other
            raise Failed(f"{python} has no pip: install it (Debian: python3-pip), or uv")
        raise Failed(explain(text, f"fetching {UV} by pip"))

    def run(self, *arguments, environment=None, quiet=False):
        """Run uv and show its progress while it works.

        Raises:
            Failed: with uv's reason on one line.
        """
        call = [self.program] + list(arguments)
        whole = dict(os.environ, **self.environment)
        whole.update(environment or {})
        said = []
        with subprocess.Popen(
            call, env=whole, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                for line in process.stderr:
                    said.append(line)
                    if not quiet and worth_showing(line):
                        say("  " + line.strip())
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise Failed(explain("".join(said), "uv " + " ".join(arguments[:2])))

    def pip(self, verb, python, *arguments, **more):
        """Run ``uv pip VERB`` on an environment with the caller's indexes and folders."""
        target = ["pip", verb, "--python", python] + self.arguments
        return self.run(*(target + list(arguments)), **more)


def worth_showing(line):
    """Tell whether a line of uv's is progress that a user wants: its steps, and large downloads."""
    words = line.split()
    if words[:1] == ["Downloading"]:
        size = words[-1].strip("()")
        return size.endswith("GiB") or size.endswith("MiB") and float(size[:-3]) >= 20
    return words[:1] in (["Prepared"], ["Installed"])


def pip_settings():
    """Translate the caller's pip settings, which uv does not read.

    Returns:
        (variables, arguments of ``uv pip``).
    """
    variables = {
        "UV_HTTP_TIMEOUT": os.environ.get("UV_HTTP_TIMEOUT", "20"),
        "UV_HTTP_RETRIES": os.environ.get("UV_HTTP_RETRIES", "2"),
    }
    if "PIP_CERT" in os.environ:
        variables["SSL_CERT_FILE"] = os.environ["PIP_CERT"]
    if "PIP_INDEX_URL" in os.environ and "UV_DEFAULT_INDEX" not in os.environ:
        variables["UV_DEFAULT_INDEX"] = os.environ["PIP_INDEX_URL"]
    arguments = []
    options = {"PIP_EXTRA_INDEX_URL": "--index", "PIP_FIND_LINKS": "--find-links"}
    for variable, option in options.items():
        for place in os.environ.get(variable, "").split():
            arguments += [option, place]
    # All versions are pinned, so that an index that has older ones must not hide the others.
    return variables, arguments + ["--index-strategy", "unsafe-best-match"]


def choose_torch(uv, directory):
    """Choose the build of torch: "cpu" where it is to be had, else "cuda".

    A line says which.

    An index that has the CPU build joins ``uv.arguments``.
    """
    wanted = "torch==" + read_pins("torch-cpu.txt")["torch"]
    python = os.path.join(directory, "bin", "python")
    brief = {"UV_HTTP_TIMEOUT": str(PYTORCH_SECONDS), "UV_HTTP_RETRIES": "0"}
    for more, environment in (([], None), (["--index", PYTORCH_INDEX], brief)):
        try:
            arguments = ["--dry-run", "--no-deps"] + more + [wanted]
            uv.pip("install", python, *arguments, environment=environment, quiet=True)
        except Failed as failed:
            if NO_ANSWER in str(failed) and not more:
                raise
            continue
        uv.arguments += more
        return "cpu"
    say(
        f"  {wanted} is in no index or folder of your pip settings (PIP_EXTRA_INDEX_URL, "
        "PIP_FIND_LINKS), and\n"
        "  PyTorch's index is out of reach: PyPI's CUDA build goes in, which works alike and takes "
        "3 GB more disk"
    )
    return "cuda"


@contextlib.contextmanager
def locked(path):
    """Hold a lock file, so that two calls side by side do not build the same thing."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
