"""SGLang: `register` is the entry point of ``sglang.srt.plugins``; SGLang calls it in the launcher and in every worker."""

from __future__ import annotations


def register() -> None:
    """Make SGLang accept the flags, or, in a worker of a server that was given them, honour them."""
    import sys

    from . import eplb, hosts, loaded, recording, reload, settings

    asked = settings.current()
    if asked is None and recording.current() is None and loaded.current() is None:
        from .launcher import LAUNCHER

        LAUNCHER.register()
    elif "sglang.srt.managers.scheduler" in sys.modules:
        # Processes without a model (detokenizer, data parallel controller) need not import the model runner. Should a
        # worker ever come without this module, `settings.SENTINEL` stops it.
        if asked is not None:
            from .worker import hooks

            hooks().register()
            if asked.moves:
                eplb.hooks().register()
            if asked.nodes > 1:
                hosts.hooks().register()
        if loaded.current() is not None:
            loaded.hooks().register()
        if asked is not None or loaded.current() is not None:
            reload.hooks().register()
        if recording.current() is not None:
            recording.hooks().register()
