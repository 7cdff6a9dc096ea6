"""Stand in for SGLang's compiled kernels, which have no CPU build on PyPI; import-only.

SGLang's CPU engine imports names from here at module level (speculative decoding, cache copies) and
calls none of them in a plain run with the torch-native back ends. A name that is called after all
raises and says so: it never returns a made-up result.
"""

from __future__ import annotations

__version__ = "0.0.0+import.only"


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def missing(*args, **kwargs):
        raise NotImplementedError(
            f"sgl_kernel.{name} was called, but this sgl_kernel is an import-only stand-in for "
            "tests"
        )

    missing.__name__ = missing.__qualname__ = name
    globals()[name] = missing
    return missing
