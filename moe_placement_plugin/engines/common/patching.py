"""Patch engines by contract.

A `Patch` says what it replaces, which parameters of it it relies on, why, where upstream discusses
it and when it can go. It is applied once however often it is asked for, undone to the very object
that was there, and counts how often its replacement ran: a patch that never runs in a worker
process is a silent failure, so the count is reported.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ...core.errors import PlacementError

_MISSING = object()
_lock = threading.RLock()


@dataclass(eq=False)
class Patch:
    """Replace one attribute of an engine.

    Attributes:
        name: short name, unique within an engine.
        target: ``"module:attribute"`` or ``"module:Class.attribute"``.
        make: called with the original, returns the replacement. It wraps functions by keeping their
            signature; whatever it returns takes the original's place as it is.
        relies_on: names of parameters that the replacement passes or reads; the original must have
            them. Empty for targets that are not functions.
        why: what is wrong or missing without it.
        upstream: upstream pull request or issue.
        removable_when: what must happen upstream for the patch to go.
        optional: a target that some supported versions lack; it is then skipped, not refused.
    """

    name: str
    target: str
    make: Callable[[Any], Any]
    why: str
    relies_on: tuple[str, ...] = ()
    upstream: str = ""
    removable_when: str = ""
    optional: bool = False
    hits: int = field(default=0, init=False)
    state: str = field(default="off", init=False)
    _undo: Callable[[], None] | None = field(default=None, init=False, repr=False)

    @property
    def module(self) -> str:
        """Name the module that holds the target."""
        return self.target.partition(":")[0]

    def _owner(self) -> tuple[Any, str]:
        owner: Any = importlib.import_module(self.module)
        *path, name = self.target.partition(":")[2].split(".")
        for part in path:
            owner = getattr(owner, part)
        return owner, name

    def check(self) -> str | None:
        """Say what of the patch's contract the installed engine breaks; None when it keeps all."""
        try:
            owner, name = self._owner()
            original = inspect.getattr_static(owner, name)
        except (ImportError, AttributeError) as error:
            return None if self.optional else f"{self.target} is not there ({error})"
        if self.state == "applied" or not self.relies_on:
            return None
        function = (
            original.__func__ if isinstance(original, (staticmethod, classmethod)) else original
        )
        if isinstance(function, property):
            return (
                f"{self.target} is a property, expected a function with {', '.join(self.relies_on)}"
            )
        parameters = inspect.signature(function).parameters
        missing = [p for p in self.relies_on if p not in parameters]
        if missing:
            return (
                f"{self.target} has parameters ({', '.join(parameters)}), expected also "
                f"{', '.join(missing)}"
            )
        return None

    def require_fit(self) -> None:
        """Refuse an engine that differs from what the patch relies on.

        Raises:
            PlacementError: naming the difference.
        """
        difference = self.check()
        if difference:
            raise PlacementError(
                f"patch {self.name} does not fit the installed engine: {difference}; use a "
                "supported version (`moe-placement doctor` lists them) or leave the placement "
                "flag out"
            )

    def apply(self) -> None:
        """Put the replacement in place; harmless when it is there already.

        Raises:
            PlacementError: when the installed engine differs from what the patch relies on.
        """
        with _lock:
            if self.state == "applied":
                return
            self.require_fit()
            try:
                owner, name = self._owner()
                original = inspect.getattr_static(owner, name)
            except (ImportError, AttributeError):
                self.state = "not needed"
                return
            own = vars(owner).get(name, _MISSING)
            kind = type(original) if isinstance(original, (staticmethod, classmethod)) else None
            replacement = self.make(original.__func__ if kind else original)
            if inspect.isfunction(replacement):
                replacement = self._counted(replacement, original.__func__ if kind else original)
            setattr(owner, name, kind(replacement) if kind else replacement)

            def undo() -> None:
                if own is _MISSING:
                    delattr(owner, name)
                else:
                    setattr(owner, name, own)

            self._undo = undo
            self.state = "applied"

    def _counted(self, replacement: Callable, original: Callable) -> Callable:
        @functools.wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.hits += 1
            return replacement(*args, **kwargs)

        return counted

    def undo(self) -> None:
        """Put the original back; harmless when it is there already."""
        with _lock:
            if self._undo is not None:
                self._undo()
                self._undo = None
            self.state = "off"


PLACEMENT, LOADING = "expert placement", "loading of experts"
EPLB, VERIFICATION, NEW_WEIGHTS = "EPLB", "verification", "new weights"
DRAFT_RECORDING = "recording of drafts"
"""Names of the sets that the adapters ask for: see `patch_set_named`."""

_named: dict[str, PatchSet] = {}


def patch_set_named(name: str) -> PatchSet:
    """Find a set of patches that was made in this process, without the list of all patches.

    Raises:
        PlacementError: when it was not made, and so cannot be in force.
    """
    if name not in _named:
        raise PlacementError(
            f"the patches of {name} were never made in this process: start it through the "
            "engine's own command, which loads plugins, or leave the placement flag out"
        )
    return _named[name]


def hits_of(*names: str) -> dict[str, int]:
    """Count how often each applied patch of these sets ran in this process.

    A set that was never made has none.
    """
    return {
        patch: count
        for name in names
        if name in _named
        for patch, count in _named[name].hits().items()
    }


def _apply_to_module(patch: Patch, module: Any) -> None:
    """Apply the patch to a module that has just been imported."""
    patch.apply()


class PatchSet:
    """Hold the patches of one concern, applied together or not at all.

    Args:
        patches: in the order in which they are applied.
        name: under which `patch_set_named` finds them in this process.
    """

    def __init__(self, patches: Iterable[Patch], name: str = ""):
        self.patches = list(patches)
        names = [p.name for p in self.patches]
        if len(set(names)) != len(names):
            raise ValueError(f"two patches share a name: {names}")
        if name:
            _named[name] = self

    def __iter__(self) -> Iterator[Patch]:
        return iter(self.patches)

    def check(self) -> list[str]:
        """Say what differs from the contracts, one sentence per patch that does not fit."""
        return [f"{p.name}: {difference}" for p in self.patches if (difference := p.check())]

    def apply(self) -> None:
        """Apply all, after all have been checked.

        Raises:
            PlacementError: naming every patch that does not fit; none is applied then.
        """
        with _lock:
            differences = self.check()
            if differences:
                raise PlacementError(
                    "the installed engine differs from what this plugin was written for: "
                    f"{'; '.join(differences)}. Use a supported version (`moe-placement doctor` "
                    "lists them) or leave the placement flag out"
                )
            done: list[Patch] = []
            try:
                for patch in self.patches:
                    if patch.state != "applied":
                        patch.apply()
                        done.append(patch)
            except BaseException:
                for patch in reversed(done):
                    patch.undo()
                raise

    def apply_when_imported(self) -> None:
        """Apply each patch when its module is imported, or now if it is.

        For processes that must not import the engine's heavy modules earlier than they would by
        themselves.
        """
        from wrapt import register_post_import_hook

        for patch in self.patches:
            if patch.module in sys.modules:
                patch.apply()
            else:
                register_post_import_hook(functools.partial(_apply_to_module, patch), patch.module)

    def undo(self) -> None:
        """Put every original back, in reverse order."""
        with _lock:
            for patch in reversed(self.patches):
                patch.undo()

    def hits(self) -> dict[str, int]:
        """Count how often each applied patch's replacement ran in this process."""
        return {p.name: p.hits for p in self.patches if p.state == "applied"}

    def report(self) -> list[dict[str, Any]]:
        """Describe each patch in a row: target, state, hits, contract, why, upstream and more."""
        return [
            {
                "name": p.name,
                "target": p.target,
                "state": p.state,
                "hits": p.hits,
                "contract": p.check() or "ok",
                "why": p.why,
                "upstream": p.upstream,
                "removable_when": p.removable_when,
            }
            for p in self.patches
        ]
