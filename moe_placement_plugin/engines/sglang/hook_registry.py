"""Apply a `Patch` through SGLang's own HookRegistry.

The registry composes the hooks of all plugins on a target and repairs ``from x import y`` bindings
that other modules hold. It only logs when a hook cannot be applied, so `missing` asks afterwards.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ...core.errors import PlacementError
from ..common.patching import Patch, PatchSet, patch_set_named

logger = logging.getLogger(__name__)


def _around(original: Callable, hook: Callable) -> Callable:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    return wrapper


@dataclass(eq=False, kw_only=True)
class Hook(Patch):
    """Run ``hook(original, *args, **kwargs)`` in place of a target.

    It is a patch that SGLang's registry applies.

    Attributes:
        hook: runs instead of the target.
        counted: whether calls are counted. Not inside code that torch.compile traces: it would
            recompile whenever the count changes.
    """

    make: Callable[[Any], Any] = field(init=False, repr=False)
    hook: Callable[..., Any] = field(repr=False)
    counted: bool = True
    _before: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.make = functools.partial(_around, hook=self.hook)
        self._run = self._run_counted if self.counted else self.hook

    @property
    def path(self) -> str:
        """Return the target as the registry writes it."""
        return self.target.replace(":", ".")

    def _run_counted(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        self.hits += 1
        if self.hits == 1:
            logger.info("patch %s in use", self.name)
        return self.hook(original, *args, **kwargs)

    def register(self) -> None:
        """Hand the hook to the registry, which applies it with all others.

        Raises:
            PlacementError: when the installed engine differs from what the patch relies on.
        """
        if self.state != "off":
            return
        difference = self.check()
        if difference:
            raise PlacementError(
                f"patch {self.name} does not fit the installed SGLang: {difference}; use a "
                "supported version (`moe-placement doctor` lists them) or leave the placement "
                "flag out"
            )
        try:
            owner, name = self._owner()
            self._before = inspect.getattr_static(owner, name)
        except (ImportError, AttributeError):
            self.state = "not needed"
            return
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        # The registry hooks a target once and passes over what is registered for it later: put this
        # one on top.
        earlier = (
            HookRegistry._hooks.pop(self.path, []) if self.path in HookRegistry._patched else None
        )
        HookRegistry.register(self.path, self._run, HookType.AROUND)
        self.state = "registered"
        if earlier is not None:
            HookRegistry._patched.discard(self.path)
            HookRegistry.apply_hooks()
            HookRegistry._hooks[self.path][:0] = earlier

    def apply(self) -> None:
        """Register the hook and have the registry apply what is registered."""
        self.register()
        if self.state == "registered":
            from sglang.srt.plugins.hook_registry import HookRegistry

            HookRegistry.apply_hooks()
            self.confirm()

    def confirm(self) -> None:
        """Note whether the registry has applied the hook.

        The target is then another object than before.
        """
        if self.state == "registered":
            owner, name = self._owner()
            if inspect.getattr_static(owner, name) is not self._before:
                self.state = "applied"

    def undo(self) -> None:
        """Put the original back, in every module that holds the hooked function.

        It is harmless when the original is there already. Hooks of other plugins on the same target
        go with it.
        """
        if self.state in ("registered", "applied"):
            from sglang.srt.plugins.hook_registry import HookRegistry

            owner, name = self._owner()
            hooked = getattr(owner, name)
            HookRegistry._hooks.pop(self.path, None)
            HookRegistry._patched.discard(self.path)
            setattr(owner, name, self._before)
            for module in list(sys.modules.values()):
                if isinstance(module, types.ModuleType) and module is not owner:
                    for attribute, value in list(vars(module).items()):
                        if value is hooked:
                            setattr(module, attribute, self._before)
        self.state = "off"


class AttributeHook(Patch):
    """Set a plain attribute among the hooks, which otherwise only functions can be."""

    def register(self) -> None:
        """Apply it at once: the registry has no part in it."""
        self.apply()

    def confirm(self) -> None:
        """Ask the registry nothing: the attribute was set at once."""


class HookSet(PatchSet):
    """Hold hooks that stand or fall together.

    The registry applies them one by one and only logs failures.
    """

    def __init__(self, hooks: Iterable[Hook | AttributeHook], name: str = ""):
        self.hooks: list[Hook | AttributeHook] = list(hooks)
        super().__init__(self.hooks, name)

    def require_fit(self) -> None:
        """Refuse an engine that differs from what the hooks rely on.

        Raises:
            PlacementError: naming every hook that does not fit.
        """
        differences = self.check()
        if differences:
            raise PlacementError(
                "the installed SGLang differs from what this plugin was written for: "
                f"{'; '.join(differences)}. Use a supported version (`moe-placement doctor` lists "
                "them) or leave the placement flag out"
            )

    def register(self) -> None:
        """Register all, after all have been checked.

        Raises:
            PlacementError: naming every hook that does not fit; none is registered then.
        """
        self.require_fit()
        for hook in self.hooks:
            hook.register()

    def apply_now(self) -> None:
        """Register all and have the registry apply them at once.

        Raises:
            PlacementError: naming the hooks that do not fit, or that the registry did not apply.
        """
        self.register()
        from sglang.srt.plugins.hook_registry import HookRegistry

        HookRegistry.apply_hooks()
        self.require_applied()

    def require_applied(self) -> None:
        """Refuse to go on without a hook that should be in force.

        Raises:
            PlacementError: naming the hooks that are not.
        """
        lost = self.missing()
        if lost:
            raise PlacementError(
                f"SGLang did not apply the hooks {', '.join(lost)} in this process, and without "
                "them the output may be wrong: its log says why; use a supported version"
            )

    def missing(self) -> list[str]:
        """Return the names of the hooks that should be in force and are not."""
        for hook in self.hooks:
            hook.confirm()
        return [hook.name for hook in self.hooks if hook.state not in ("applied", "not needed")]


def require_applied(name: str) -> None:
    """Refuse to go on without the hooks of a set that was made in this process.

    Args:
        name: of the set, see `patching.patch_set_named`.

    Raises:
        PlacementError: naming the hooks that are not in force.
    """
    _set_named(name).require_applied()


def apply_now(name: str) -> None:
    """Apply the hooks of a set that was made in this process.

    Args:
        name: of the set, see `patching.patch_set_named`.

    Raises:
        PlacementError: naming the hooks that do not fit, or that the registry did not apply.
    """
    _set_named(name).apply_now()


def _set_named(name: str) -> HookSet:
    found = patch_set_named(name)
    assert isinstance(found, HookSet), "SGLang's sets are of hooks"
    return found
