import inspect
import sys
import types

import pytest

from moe_placement_plugin import PlacementError
from moe_placement_plugin.engines.common.patching import Patch, PatchSet


class Engine:
    """Stands for an engine's class; installed as a module below."""

    def load(self, weights, rank):
        return ("stock", weights, rank)

    @staticmethod
    def add_args(parser):
        return ["stock", parser]

    @classmethod
    def build(cls, args):
        return (cls, args)


class Derived(Engine):
    pass


@pytest.fixture
def module(monkeypatch):
    module = types.ModuleType("fake_engine")
    module.Engine = type("Engine", (), dict(vars(Engine)))
    module.Derived = type("Derived", (module.Engine,), {})
    module.place = lambda expert, ranks: expert // ranks
    monkeypatch.setitem(sys.modules, "fake_engine", module)
    return module


def wrapping(label):
    def make(original):
        def replacement(*args, **kwargs):
            return (label, original(*args, **kwargs))

        return replacement

    return make


def patch(target, relies_on=(), **more):
    return Patch(
        more.pop("name", target), target, wrapping("ours"), why="test", relies_on=relies_on, **more
    )


@pytest.mark.parametrize(
    "target", ["place", "Engine.load", "Engine.add_args", "Engine.build", "Derived.load"]
)
def test_apply_is_idempotent_and_undo_restores_the_very_object(module, target):
    def owner():
        cls, _, name = target.rpartition(".")
        return (getattr(module, cls) if cls else module), name

    holder, name = owner()
    had = name in vars(holder)
    before = inspect.getattr_static(holder, name)
    p = patch(f"fake_engine:{target}")
    p.apply()
    first = inspect.getattr_static(holder, name)
    assert first is not before and type(first) is type(before)
    p.apply()
    assert inspect.getattr_static(holder, name) is first
    p.undo()
    assert inspect.getattr_static(holder, name) is before and (name in vars(holder)) == had
    p.undo()
    assert p.state == "off"


def test_replacement_sees_the_original_and_hits_are_counted(module):
    p = patch("fake_engine:Engine.load", ("weights",))
    p.apply()
    assert module.Engine().load(1, rank=2) == ("ours", ("stock", 1, 2))
    assert module.Derived().load(1, 2)[0] == "ours"
    assert p.hits == 2
    q = patch("fake_engine:Engine.build")
    q.apply()
    assert module.Derived.build(5) == ("ours", (module.Derived, 5)) and q.hits == 1


@pytest.mark.parametrize(
    "target, relies_on, message",
    [
        ("fake_engine:place", ("layer",), r"has parameters \(expert, ranks\), expected also layer"),
        ("fake_engine:gone", (), "is not there"),
        ("no_such_engine_module:x", (), "is not there"),
        ("fake_engine:Engine.gone", (), "is not there"),
    ],
)
def test_a_contract_that_does_not_match_is_refused_and_nothing_is_touched(
    module, target, relies_on, message
):
    good = patch("fake_engine:Engine.load")
    before = module.Engine.load
    patches = PatchSet([good, patch(target, relies_on, name="bad")])
    with pytest.raises(PlacementError, match=message) as error:
        patches.apply()
    assert "bad" in str(error.value) and "doctor" in str(error.value)
    assert module.Engine.load is before and good.state == "off"
    assert patches.report()[1]["contract"] != "ok"


def test_an_optional_target_may_be_missing(module):
    p = patch("fake_engine:gone", optional=True)
    p.apply()
    assert p.state == "not needed" and p.check() is None


def test_a_set_undoes_what_it_did_when_a_patch_fails_half_way(module):
    def explode(original):
        raise RuntimeError("boom")

    before = module.place
    patches = PatchSet(
        [
            patch("fake_engine:place"),
            Patch("explodes", "fake_engine:Engine.load", explode, why="test"),
        ]
    )
    with pytest.raises(RuntimeError, match="boom"):
        patches.apply()
    assert module.place is before


def test_two_patches_may_not_share_a_name():
    with pytest.raises(ValueError, match="share a name"):
        PatchSet([patch("a:b", name="same"), patch("a:c", name="same")])


def test_patches_wait_for_the_import_of_their_module(monkeypatch, tmp_path):
    (tmp_path / "late_engine.py").write_text("def place(expert):\n    return expert\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    p = patch("late_engine:place", ("expert",))
    PatchSet([p]).apply_when_imported()
    assert p.state == "off" and "late_engine" not in sys.modules
    import late_engine

    assert p.state == "applied" and late_engine.place(3) == ("ours", 3)
    sys.modules.pop("late_engine")


def test_report_has_a_row_per_patch(module):
    patches = PatchSet([patch("fake_engine:place", upstream="PR 1", removable_when="never")])
    patches.apply()
    module.place(1, 2)
    (row,) = patches.report()
    assert (
        row["state"] == "applied"
        and row["hits"] == 1
        and row["contract"] == "ok"
        and row["upstream"] == "PR 1"
    )
    assert patches.hits() == {"fake_engine:place": 1}
