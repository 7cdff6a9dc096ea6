"""Test the script that builds environments: what it says when it cannot.

Nothing half-built is left.
"""

import functools
import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from tests.support.paths import ROOT

SCRIPT = ROOT / "scripts" / "environment"

# uv's place is taken by a script that makes folders, or fails as the variable says.
UV = """#!/usr/bin/env bash
echo "$@" >> "$SAID"
case "$1 $2" in
--version*) echo "uv 0.13.9 (fake)" ;;
venv*) mkdir -p "${@: -1}/bin"; ln -s "$(command -v python3)" "${@: -1}/bin/python" ;;
"pip install")
    if [[ $* == *--dry-run* ]]; then [[ $* == *"$HAS_TORCH"* ]]; exit; fi
    if [[ $UV_FAILS == hang ]]; then touch "$SAID.hangs"; exec sleep 60; fi
    if [[ -n $UV_FAILS ]]; then echo "error: $UV_FAILS" >&2; exit 1; fi ;;
esac
"""


@pytest.fixture
def place(tmp_path):
    """Make a folder for environments with the stand-in for uv in it."""
    program = tmp_path / "envs" / ".uv" / "bin" / "uv"
    program.parent.mkdir(parents=True)
    program.write_text(UV)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return tmp_path / "envs"


def variables(place, **more):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_"))}
    given = {
        "SAID": str(place / "said"),
        "HAS_TORCH": "none",
        "UV_FAILS": "",
        "PYTHON": sys.executable,
    }
    return kept | given | more


def build(place, **more):
    return subprocess.run(
        [sys.executable, str(SCRIPT), "vllm", str(place / "vllm")],
        env=variables(place, **more),
        capture_output=True,
        text=True,
        timeout=60,
    )


def finished(place):
    """Return what stands where an environment would.

    Nothing but lock files and uv may be left after a failure.
    """
    return [p.name for p in place.iterdir() if p.is_dir() and p.name != ".uv"]


@pytest.mark.parametrize(
    ("fails", "says"),
    [
        ("No space left on device (os error 28)", "the disk is full"),
        ("error sending request for url (x): dns error", "no answer from the package index"),
        ("operation timed out", "no answer from the package index"),
        ("no version of nonsense==1", "uv pip install failed: error: no version of nonsense==1"),
    ],
)
def test_a_failed_installation_says_why_in_a_line_and_leaves_nothing(place, fails, says):
    found = build(place, UV_FAILS=fails)
    assert found.returncode == 1 and not finished(place)
    assert found.stderr.count("\n") == 1 and says in found.stderr


def test_a_failure_leaves_the_environment_that_was_there(place):
    (place / "vllm").mkdir()
    (place / "vllm" / ".stamp").write_text("of another version")
    assert build(place, UV_FAILS="whatever").returncode == 1
    assert finished(place) == ["vllm"]


def test_what_does_not_work_after_all_is_no_environment(place):
    """The stand-in installs nothing.

    So the check finds the lists' first distribution missing.
    """
    found = build(place)
    assert found.returncode == 1 and not finished(place)
    assert "does not work" in found.stderr and "in place of" in found.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_cancelled_installation_leaves_nothing(place, number):
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "vllm", str(place / "vllm")],
        env=variables(place, UV_FAILS="hang"),
        stderr=subprocess.PIPE,
        text=True,
        # A test run in a shell's background ignores SIGINT, and so would all that it starts.
        preexec_fn=functools.partial(signal.signal, number, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (place / "said.hangs").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode not in (0, None) and not finished(place)


@pytest.mark.parametrize(
    ("python", "says"),
    [
        ("no-such-python", "PYTHON=no-such-python: there is no such program"),
        ("false", "false is Python that does not start; the pinned engines run on 3.11 or 3.12"),
    ],
)
def test_an_interpreter_that_will_not_do(place, python, says):
    found = build(place, PYTHON=python)
    assert found.returncode == 1 and says in found.stderr and not finished(place)


def test_the_callers_indexes_and_folders_are_uvs(place):
    build(
        place,
        PIP_FIND_LINKS="/some/wheels /more",
        PIP_EXTRA_INDEX_URL="https://i/simple",
        HAS_TORCH="torch",
    )
    (install,) = [
        line
        for line in (place / "said").read_text().splitlines()
        if line.startswith("pip install") and "--requirements" in line
    ]
    for pair in ("--find-links /some/wheels", "--find-links /more", "--index https://i/simple"):
        assert pair in install


@pytest.mark.parametrize(
    ("has", "build_of_torch"),
    [("none of them", "cuda"), ("--dry-run", "cpu"), ("download.pytorch.org", "cpu")],
)
def test_the_build_of_torch_is_chosen_and_said(place, has, build_of_torch):
    found = build(place, HAS_TORCH=has)
    assert ("PyPI's CUDA build goes in" in found.stdout) == (build_of_torch == "cuda")
    install = (place / "said").read_text().splitlines()
    assert any("download.pytorch.org" in line for line in install) == (has != "--dry-run")


def in_script(code):
    """Run code beside the script's modules, which are no package of the project's."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=SCRIPT, capture_output=True, text=True, timeout=60
    )


def test_another_kind_of_machine_is_refused():
    code = (
        "import platform; platform.machine = lambda: 'aarch64'; "
        "import machine; machine.check_machine()"
    )
    found = in_script(code)
    assert "this machine is Linux on aarch64" in found.stderr.splitlines()[-1]


def test_a_disk_that_would_be_full_is_refused():
    code = (
        "import shutil, types; shutil.disk_usage = lambda p: types.SimpleNamespace(free=1 << 30)\n"
        "import machine; machine.check_space('/', 'cuda')"
    )
    said = in_script(code).stderr.splitlines()[-1]
    assert "has 1.0 GB free" in said and "need 9 GB" in said
