"""Test hooks through SGLang's registry.

They are applied once, undone, refused on another contract, and missed when the registry fails.
"""

from __future__ import annotations

import sys
import types

import pytest

from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.engines.sglang.hook_registry import Hook, HookSet

_HOME = """
def add(left, right):
    return left + right

class Box:
    def __init__(self, size):
        self.size = size
"""


@pytest.fixture
def engine(monkeypatch):
    """Make two modules of a made-up engine.

    One defines a function, the other has imported it by name.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    home, user = types.ModuleType("made_up_home"), types.ModuleType("made_up_user")
    exec(_HOME, vars(home))
    user.add = home.add
    for module in (home, user):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    hooks, patched = dict(HookRegistry._hooks), set(HookRegistry._patched)
    yield types.SimpleNamespace(home=home, user=user)
    HookRegistry._hooks.clear()
    HookRegistry._hooks.update(hooks)
    HookRegistry._patched.clear()
    HookRegistry._patched.update(patched)


def doubled(original, left, right):
    return 2 * original(left, right)


def hook(**changes) -> Hook:
    plain = {
        "name": "double",
        "target": "made_up_home:add",
        "hook": doubled,
        "relies_on": ("left",),
        "why": "test",
    }
    return Hook(**plain | changes)


def test_applied_once_counted_and_undone_in_every_module(engine):
    original = engine.home.add
    patch = hook()
    patch.apply()
    patch.apply()
    assert engine.home.add(1, 2) == 6
    assert engine.user.add(1, right=2) == 6
    assert (patch.state, patch.hits) == ("applied", 2)
    patch.undo()
    assert engine.home.add is original and engine.user.add is original
    patch.undo()
    patch.apply()
    assert engine.user.add(1, 2) == 6
    patch.undo()


def test_a_target_that_is_hooked_already_gets_the_next_hook_on_top(engine):
    first, second = (
        hook(),
        hook(name="more", hook=lambda original, left, right: original(left, right) + 1),
    )
    first.apply()
    second.apply()
    assert engine.home.add(1, 2) == engine.user.add(1, 2) == 7
    assert (first.hits, second.hits, second.state) == (2, 2, "applied")


def test_a_method(engine):
    def larger(original, self, size):
        original(self, size + 1)

    patch = hook(name="box", target="made_up_home:Box.__init__", hook=larger, relies_on=("size",))
    patch.apply()
    assert engine.home.Box(1).size == 2
    patch.undo()
    assert engine.home.Box(1).size == 1


def test_another_contract_is_refused_and_named(engine):
    with pytest.raises(
        PlacementError,
        match=r"patch double does not fit .* has parameters \(left, right\), expected also factor",
    ):
        hook(relies_on=("left", "factor")).apply()
    with pytest.raises(PlacementError, match="double.*is not there"):
        hook(target="made_up_home:subtract").apply()
    assert engine.home.add(1, 2) == 3


def test_a_set_registers_all_or_none(engine):
    fits, other = (
        hook(),
        hook(name="other", target="made_up_home:Box.__init__", relies_on=("colour",)),
    )
    with pytest.raises(PlacementError, match="other.*colour"):
        HookSet([fits, other]).register()
    assert fits.state == "off"


def test_hooks_that_the_registry_does_not_apply_are_missed(engine):
    from sglang.srt.plugins.hook_registry import HookRegistry

    hooks = HookSet([hook()])
    assert hooks.missing() == ["double"]
    hooks.register()
    assert hooks.missing() == ["double"]
    HookRegistry.apply_hooks()
    assert hooks.missing() == []
    hooks.undo()
    assert hooks.missing() == ["double"]


def test_uncounted_hooks_leave_no_counter_to_trace(engine):
    patch = hook(counted=False)
    patch.apply()
    assert engine.home.add(1, 2) == 6 and patch.hits == 0
    patch.undo()


def test_every_worker_hook_says_why_and_when_it_can_go():
    from moe_placement_plugin.engines.sglang.patches import placement_set

    for patch in placement_set():
        assert patch.why and patch.removable_when and patch.relies_on, patch.name
        assert patch.check() is None, patch.name
