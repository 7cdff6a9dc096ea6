"""Read the lists of requirements/, and digest all that an environment is made of."""

import hashlib
import os

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
REQUIREMENTS = os.path.join(ROOT, "requirements")
STANDINS = os.path.join(ROOT, "tests", "support", "sglang_cpu")


def read_text(path):
    """Read a file, None when it is not there."""
    try:
        with open(path) as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_pins(name):
    """Read a list of requirements/: {distribution: version}."""
    pins = {}
    for line in (read_text(os.path.join(REQUIREMENTS, name)) or "").splitlines():
        if line and not line.startswith("#"):
            distribution, version = line.split("==")
            pins[distribution] = version
    return pins


def stamp_of(engine, pins, python_version):
    """Digest all that an environment is made of."""
    digest = hashlib.sha256()
    for part in (engine, ROOT, python_version, repr(sorted(pins.items()))):
        digest.update(part.encode() + b"\0")
    here = os.path.dirname(os.path.abspath(__file__))
    sources = [os.path.join(here, name) for name in os.listdir(here) if name.endswith(".py")]
    files = [os.path.join(ROOT, "pyproject.toml"), *sources]
    files += [os.path.join(REQUIREMENTS, f"torch-{build}.txt") for build in ("cpu", "cuda")]
    if engine == "sglang":
        files.append(os.path.join(STANDINS, "pyproject.toml"))
        for folder, _, names in os.walk(os.path.join(STANDINS, "src")):
            files += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    for path in sorted(files):
        digest.update(path.encode() + b"\0" + (read_text(path) or "").encode())
    return digest.hexdigest()
