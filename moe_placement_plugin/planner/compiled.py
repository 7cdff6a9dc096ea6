"""How the planner's kernels are compiled: by numba, for one thread, and kept on disk.

numba keeps compiled code next to the source, or in the user's cache folder where that cannot be written, and throws it away when the
function's own
file changes. A kernel that calls one of another file would stay as it was compiled: after an upgrade it would go on running the old code
of the
other. So here the stamp of every kernel is that of all the planner's files.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from numba import njit


def _digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


_SOURCES = _digest()


def kernel(function):
    """Compile ``function`` on first use, in nopython mode, and cache the code until any file of the planner changes."""
    compiled = njit(cache=True)(function)
    files = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    if files is not None and hasattr(files, "_source_stamp"):
        files._source_stamp = (files._source_stamp, _SOURCES)
    return compiled


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
