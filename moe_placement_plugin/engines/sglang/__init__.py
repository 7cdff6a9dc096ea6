"""SGLang: `register` is the entry point of ``sglang.srt.plugins``; SGLang calls it in the launcher and in every worker."""

from __future__ import annotations


def register() -> None:
    """Make SGLang accept the flags, or, in a worker of a server that was given them, honour them."""
    import sys

    from . import eplb, hosts, recording, reload, settings, verification  # lazy: numba

    asked = settings.current()
    if asked is None and recording.current() is None and verification.current() is None:
        from .flags import LAUNCHER  # lazy: heavy

        LAUNCHER.register()
    elif "sglang.srt.managers.scheduler" in sys.modules:
        # Processes without a model (detokenizer, data parallel controller) need not import the model runner. Should a
        # worker ever come without this module, `settings.SENTINEL` stops it.
        if asked is not None:
            from .patches import hooks  # lazy: numba

            hooks().register()
            if asked.moves:
                eplb.hooks().register()
            if asked.nodes > 1:
                hosts.hooks().register()
        if verification.current() is not None:
            verification.hooks().register()
        if asked is not None or verification.current() is not None:
            reload.hooks().register()
        if recording.current() is not None:
            recording.hooks().register()
