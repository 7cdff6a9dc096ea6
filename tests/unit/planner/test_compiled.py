"""Check where compiled kernels are kept, and that processes compile them once.

Beside the source, in the user's cache folder, or where NUMBA_CACHE_DIR says.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moe_placement_plugin
from moe_placement_plugin.planner.kernels.compiled import file_lock, inner_kernel, kernel
from moe_placement_plugin.planner.kernels.state import SlotLists

SCRIPT = """
import numpy as np
from pathlib import Path
from moe_placement_plugin.planner.kernels import evaluate
before = sum(evaluate.moved_slots.stats.cache_hits.values())
moved = np.empty(1, np.int64)
old, new = np.array([[0, 1]], np.int32), np.array([[1, 0]], np.int32)
evaluate.moved_slots(old, new, np.array([0, 1, 2]), moved)
stats = evaluate.moved_slots.stats
hits, misses = sum(stats.cache_hits.values()), sum(stats.cache_misses.values())
print(Path(evaluate.__file__).parents[2], moved[0], hits, misses, stats.cache_path, sep="|")
"""


@pytest.fixture
def installed(tmp_path):
    """Copy the package where a file stands in the place of the folder beside the source."""
    package = tmp_path / "site-packages" / "moe_placement_plugin"
    shutil.copytree(
        Path(moe_placement_plugin.__file__).parent,
        package,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    (package / "planner" / "kernels" / "__pycache__").write_text(
        ""
    )  # permissions would not stop root
    return package


def run(package, home, **more):
    kept = {k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    env = (
        kept
        | {"PYTHONPATH": str(package.parent), "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
        | more
    )
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=env,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    where, moved, hits, misses, cache = found.stdout.strip().split("|")
    assert Path(where) == package and moved == "2"
    return int(hits), int(misses), Path(cache)


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [False, True])
def test_an_installation_that_cannot_be_written_caches_elsewhere(installed, tmp_path, chosen):
    home = tmp_path / "home"
    home.mkdir()
    more = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")} if chosen else {}
    hits, misses, cache = run(installed, home, **more)
    assert (hits, misses) == (0, 1)
    assert (tmp_path / "cache" if chosen else home) in cache.parents
    assert list(cache.glob("evaluate.moved_slots-*.nbi"))
    assert run(installed, home, **more)[:2] == (1, 0)
    if not chosen:
        return
    # Any file of the planner counts: a kernel that calls one of another file must not outlive it.
    (installed / "planner" / "kernels" / "bound.py").write_text(
        (installed / "planner" / "kernels" / "bound.py").read_text() + "\n# changed\n"
    )
    assert run(installed, home, **more)[:2] == (0, 1)


@pytest.mark.slow
def test_processes_that_need_a_kernel_at_once_compile_it_once(tmp_path):
    met = tmp_path / "met"
    met.mkdir()
    meet = (
        f"import time; Path({str(met)!r}, str(time.time_ns())).touch()\n"
        f"while len(list(Path({str(met)!r}).iterdir())) < 3: time.sleep(0.001)\n"
        "moved = np.empty(1, np.int64)\n"
    )
    script = SCRIPT.replace("moved = np.empty(1, np.int64)\n", meet)
    assert script != SCRIPT
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=300)[0].split("|") for process in processes]
    assert sorted((int(row[2]), int(row[3])) for row in said) == [(0, 1), (1, 0), (1, 0)]


@pytest.mark.slow
def test_compiled_code_is_loaded_while_another_process_compiles(tmp_path):
    """Hold the kernel's lock for good: who finds the code in the cache does not ask for it."""
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}

    def hits() -> int:
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
        return int(done.stdout.split("|")[2])

    assert hits() == 0
    (index,) = tmp_path.rglob("evaluate.moved_slots-*.nbi")
    with file_lock(index.parent / f"{index.name}.lock"):
        assert hits() == 1


def test_a_lock_that_is_not_given_back_holds_nobody_up_for_ever(tmp_path):
    with file_lock(tmp_path / "lock"):
        with file_lock(tmp_path / "lock", seconds=0.1):
            reached = True
    assert reached


@pytest.mark.slow
def test_a_plan_without_scipys_linear_algebra():
    """Plan in a process of its own without it, and import it afterwards."""
    code = (
        "import sys\n"
        "from moe_placement_plugin.planner.kernels.compiled import without_blas\n"
        "without_blas()\n"
        "import numpy as np\n"
        "from moe_placement_plugin.planner import plan\n"
        "plan(np.arange(1, 17)[None], (8, 8))\n"
        "assert 'scipy.linalg' not in sys.modules\n"
        "import scipy.linalg.cython_blas\n"
        "without_blas()\n"
        "assert sys.modules['scipy.linalg.cython_blas'] is not None\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_planners_choices_are_known_without_numba():
    code = (
        "import sys\n"
        "from moe_placement_plugin.planner.options import LOCALITIES\n"
        "from moe_placement_plugin.planner import EFFORTS\n"
        "assert not {'numba', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@inner_kernel
def _shorter(lists):
    return SlotLists(lists.first[1:], lists.next)


@kernel
def _first_of_shorter(lists):
    return _shorter(lists).first[0]


def test_an_inner_kernel_that_returns_arrays_has_to_say_so():
    """Nobody would count references to them: the memory would be freed while it is in use."""
    lists = SlotLists(np.arange(3), np.arange(3))
    with pytest.raises(TypeError, match="_shorter returns SlotLists.*give makes_arrays=True"):
        _first_of_shorter(lists)
