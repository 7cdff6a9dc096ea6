"""Compile the planner's kernels by numba, for one thread, once for all processes, and keep them on disk.

numba keeps compiled code next to the source, or in the user's cache folder where that cannot be
written, and throws it away when the function's own file changes. A kernel that calls one of another
file would stay as it was compiled: after an upgrade it would go on running the old code of the other.
Therefore the stamp of every kernel is that of all the planner's files.

All ranks of a server need the same kernels at the same moment. One of them compiles each; the others
wait for its file in place of compiling the same thing side by side.
"""

from __future__ import annotations

import fcntl
import hashlib
import pickle
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.compiler_lock import global_compiler_lock

COMPILING_SECONDS = 120.0
"""Longest wait for another process's compilation: many times what the slowest kernel takes."""


def _digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


_SOURCES = _digest()


def kernel(function=None, **options: Any):
    """Compile ``function`` on first use, in nopython mode, and cache the code until any file of the planner changes.

    Args:
        options: numba's, such as ``nogil=True``.
    """
    if function is None:
        return lambda given: kernel(given, **options)
    compiled = njit(cache=True, **options)(function)
    files = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    if files is not None and hasattr(files, "_source_stamp"):
        files._source_stamp = (files._source_stamp, _SOURCES)
        _compile_in_one_process(compiled, Path(compiled.stats.cache_path), files._index_name)
    return compiled


def _compile_in_one_process(compiled: Any, folder: Path, index: str) -> None:
    """Have processes that compile the same kernel take turns: all but the first find it in the cache."""
    original = compiled.compile

    def compile(signature):
        # numba's own lock first: a thread that compiles a caller of this kernel holds it already.
        with global_compiler_lock:
            # Loading takes no turns: of many processes that load at once the last would wait for all.
            if _is_kept(compiled, signature):
                return original(signature)
            with file_lock(folder / f"{index}.lock"):
                return original(signature)

    compiled.compile = compile


def _is_kept(compiled: Any, signature: Any) -> bool:
    """Tell whether numba's cache has the code for a signature; False where that cannot be seen."""
    try:
        cache = compiled._cache
        key = cache._index_key(signature, compiled.targetctx.codegen())
        return key in cache._cache_file._load_index()
    except (AttributeError, OSError, EOFError, pickle.PickleError):
        return False


@contextmanager
def file_lock(path: Path, seconds: float = COMPILING_SECONDS) -> Iterator[None]:
    """Hold a lock file, for ``seconds`` at most as one waits for it; without one where it cannot be had."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")  # noqa: SIM115 - closed below, which frees the lock
    except OSError:
        yield
        return
    with file:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # a file system without locks
                break
        yield


def without_blas() -> None:
    """Keep numba from importing scipy.linalg, which takes a fifth of a second and serves np.dot alone, of which the planner has none.

    Only for a process in which nobody else compiles with numba, as the command line's: a kernel with np.dot would be refused there.
    """
    blas = "scipy.linalg.cython_blas"
    if blas in sys.modules:
        return
    # None is the import system's own sign for a module that cannot be imported; typeshed does not know it.
    sys.modules[blas] = None  # type: ignore[assignment]
    try:
        import numba.np.arraymath  # noqa: F401  it looks for scipy when it is imported, never again
    finally:
        del sys.modules[blas]
