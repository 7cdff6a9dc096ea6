"""Plug into vLLM: entry points, flags, static placement, expert parallelism on the CPU build.

Both entry points run in every process that vLLM starts. Without a request for placement they touch
nothing. Settings travel inside ``VllmConfig.additional_config`` as a `settings.PlacementSettings`,
whose unpickling applies the patches: a process without this package cannot read the config and dies
instead of serving with the default placement.
"""


def general_plugin() -> None:
    """Accept the flag if it is asked for; the entry point of ``vllm.general_plugins``."""
    from .detect import requested  # lazy: heavy

    if requested():
        from .flags import open_flags  # lazy: heavy

        open_flags()


def platform_plugin() -> None:
    """Accept the flag before general plugins load: entry point of ``vllm.platform_plugins``.

    Code that builds vLLM's argument parser by itself does so before general plugins load. Returns
    None, which tells vLLM that this is no platform.
    """
    from .detect import requested  # lazy: heavy

    if requested(frames=False):
        from wrapt import register_post_import_hook

        from .flags import open_flags  # lazy: heavy

        register_post_import_hook(lambda _: open_flags(), "vllm.engine.arg_utils")


def enable() -> None:
    """Accept the flags in this process from now on, whether vLLM is imported already or not."""
    from wrapt import register_post_import_hook

    from .detect import count_as_requested  # lazy: heavy
    from .flags import open_flags  # lazy: heavy

    count_as_requested()
    register_post_import_hook(lambda _: open_flags(), "vllm.engine.arg_utils")
