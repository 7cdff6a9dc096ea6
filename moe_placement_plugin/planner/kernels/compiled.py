"""Compile the planner's kernels by numba: once for all processes, and kept on disk.

numba keeps compiled code next to the source, or in the user's cache folder where that cannot be
written, and throws it away when the function's own file changes. A kernel that calls one of another
file would stay as it was compiled: after an upgrade it would go on running the old code of the
other. Therefore the stamp of every kernel is that of all the planner's files.

All ranks of a server need the same kernels at the same moment. One of them compiles each; the
others wait for its file in place of compiling the same thing side by side.
"""

from __future__ import annotations

import fcntl
import hashlib
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.compiler_lock import global_compiler_lock

COMPILING_SECONDS = 120.0
"""Longest wait for another process's compilation: many times what the slowest kernel takes."""


def _digest() -> str:
    """Return a digest of all the planner's files."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


_SOURCES = _digest()


def kernel(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compile a function on first use, and cache the code until any file of the planner changes.

    Args:
        function: in numba's nopython mode.
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


def inner_kernel(
    function: Callable[..., Any] | None = None,
    *,
    makes_arrays: bool = False,
    inlined: bool = False,
) -> Any:
    """Compile a function that only kernels call: into each of them, with which it is kept.

    Args:
        function: in numba's nopython mode.
        makes_arrays: whether it makes or returns arrays. One that does not works on arrays that its
            caller holds, so that references to them need not be counted. numba sees that by itself
            only where arguments are arrays: for arrays in tuples it would count them in every loop
            that uses them, which takes several times as long as the work itself.
        inlined: whether to make it part of its callers however long it is: one of a single place,
            where hundreds of arguments, as all fields of tuples are in the end, take time to pass.

    Raises:
        TypeError: from the compilation of one that returns arrays and does not say so.
    """
    if function is None:
        return lambda given: inner_kernel(given, makes_arrays=makes_arrays, inlined=inlined)
    # What nobody calls from Python needs no wrapper, which takes a third of the time to compile.
    compiled = njit(
        _nrt=makes_arrays, forceinline=inlined, no_cpython_wrapper=True, no_cfunc_wrapper=True
    )(function)
    if not makes_arrays:
        _refuse_arrays(compiled)
    return compiled


def _refuse_arrays(compiled: Any) -> None:
    """Have the compilation of a kernel fail that returns arrays whose references nobody counts."""
    original = compiled.compile

    def compile(signature: Any) -> Any:
        entry = original(signature)
        for result in compiled.overloads.values():
            returned = result.signature.return_type
            if result.target_context.data_model_manager[returned].contains_nrt_meminfo():
                raise TypeError(f"{compiled.__name__} returns {returned}: give makes_arrays=True")
        return entry

    compiled.compile = compile


def _compile_in_one_process(compiled: Any, folder: Path, index: str) -> None:
    """Have processes that compile one kernel take turns: all but the first find it in the cache."""
    original = compiled.compile

    def compile(signature: Any) -> Any:
        # numba's own lock first: a thread that compiles a caller of this kernel holds it already.
        with global_compiler_lock:
            # Loading takes no turns: of many processes that load at once the last would wait for
            # all.
            if _is_kept(compiled, signature):
                return original(signature)
            with file_lock(folder / f"{index}.lock"):
                return original(signature)

    compiled.compile = compile


def _is_kept(compiled: Any, signature: Any) -> bool:
    """Decide whether numba's cache has the code for a signature; False where that is not seen."""
    try:
        cache = compiled._cache
        key = cache._index_key(signature, compiled.targetctx.codegen())
        return key in cache._cache_file._load_index()
    except (AttributeError, OSError, EOFError, pickle.PickleError):
        return False


@contextmanager
def file_lock(path: Path, seconds: float = COMPILING_SECONDS) -> Iterator[None]:
    """Hold a lock file; without it where it cannot be had, or not within ``seconds``."""
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
    """Keep numba from importing scipy.linalg, which serves np.dot alone: the planner has none.

    Only for a process in which nobody else compiles with numba, as the command line's: a kernel
    with np.dot would be refused there.
    """
    blas = "scipy.linalg.cython_blas"
    if blas in sys.modules:
        return
    # None is the import system's own sign for a module that cannot be imported; typeshed does not
    # know it.
    sys.modules[blas] = None  # type: ignore[assignment]
    try:
        import numba.np.arraymath  # noqa: F401  it looks for scipy when it is imported, never again
    finally:
        del sys.modules[blas]
