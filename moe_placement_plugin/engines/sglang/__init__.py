"""Plug into SGLang through `register`.

It is the entry point of ``sglang.srt.plugins``; SGLang calls it in the launcher and in every
worker.
"""

from __future__ import annotations


def register() -> None:
    """Make SGLang accept the flags, or honour them in a worker of a server that was given them."""
    import sys

    from .state import STATE  # lazy: heavy

    if STATE.settings is None:
        from .flags import LAUNCHER  # lazy: heavy

        LAUNCHER.register()
    elif "sglang.srt.managers.scheduler" in sys.modules:
        # Processes without a model (detokenizer, data parallel controller) need not import the
        # model runner. Should a worker ever come without this module, `state.SENTINEL` stops it.
        from .patches import patch_sets  # lazy: numba

        for patches in patch_sets(STATE.settings):
            patches.register()
