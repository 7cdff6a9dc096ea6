"""Drafts of speculative decoding: told from the target, placed by rows and strategy of their own, never refused for its sake."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed in this environment")
import torch  # noqa: E402

from moe_placement_plugin import ExpertLoad, Placement, PlacementError  # noqa: E402
from moe_placement_plugin.engines.common.settings import RecordingSettings  # noqa: E402
from moe_placement_plugin.engines.vllm import (  # noqa: E402
    draft_recording,
    drafts,
    expert_maps,
    loading,
    speculator_recording,
)
from moe_placement_plugin.engines.vllm.state import KEY, Carried  # noqa: E402
from moe_placement_plugin.formats.plan_or_load import write  # noqa: E402
from tests.support.vllm_settings import make_settings  # noqa: E402

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]  # imports vLLM, starts no engine

DRAFT = Placement([[1, 3, 0, 2], [3, 2, 1, 0]], 4, (2, 2), (0, 61))
PLAN = Placement([[5, 4, 3, 2, 1, 0]] * 2, 6, (3, 3), (0, 1), "eplb", {}, DRAFT)
WITHOUT = Placement([[5, 4, 3, 2, 1, 0]] * 2, 6, (3, 3), (0, 1), "eplb")


def configs(method: str):
    """(vllm_config, model_config) with which vLLM loads the target, and the draft, if there is one."""
    target, draft = (
        SimpleNamespace(model=name, architecture=name, get_num_experts=lambda: 6)
        for name in ("target", "draft")
    )
    if method == "ngram":
        draft = target
    speculative = SimpleNamespace(target_model_config=target, draft_model_config=draft)
    base = SimpleNamespace(
        model_config=target,
        speculative_config=None if method == "none" else speculative,
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
    )
    own = SimpleNamespace(**{**vars(base), "model_config": draft})
    loads = [(base, target)]
    if method in ("mtp", "eagle"):
        loads.append((base, draft))
    if method == "draft_model":
        loads.append((own, draft))  # vLLM puts the draft where the target was
    return loads


@pytest.mark.parametrize("method", ["none", "ngram", "mtp", "eagle", "draft_model"])
def test_the_draft_is_told_from_the_target(method):
    assert [drafts.is_draft(*load) for load in configs(method)] == [False, True][: len(configs(method))]  # fmt: skip


def test_a_draft_numbers_its_layers_by_itself():
    assert drafts.draft_layer_id("draft_model.model.layers.3.mlp.experts") == 3
    assert drafts.draft_layer_id("model.layers.61.mtp_block.mlp.experts") == 61
    assert drafts.draft_layer_id("mtp.layers.0.mlp.experts") == 0
    assert drafts.draft_layer_id("mtp.block.mlp.experts") is None


def test_a_drafts_layer_is_not_the_targets_of_the_same_number():
    settings = make_settings("eplb", PLAN, 2)
    for rank in range(2):
        assert (
            expert_maps.expert_map(settings, 0, 6, 2, rank).tolist()
            == PLAN.expert_map(0, rank).tolist()
        )
        found = expert_maps.expert_map(settings, 0, 4, 2, rank, draft=True)
        assert found.tolist() == DRAFT.expert_map(0, rank).tolist()
    # Without rows of its own: the strategy's, and contiguous where the strategy needs a load.
    zigzag, eplb = (make_settings(name, WITHOUT, 2) for name in ("zigzag", "eplb"))
    assert expert_maps.expert_map(zigzag, 0, 6, 2, 1, draft=True).tolist() == [-1, 0, -1, 1, -1, 2]
    assert expert_maps.expert_map(eplb, 0, 6, 2, 1, draft=True).tolist() == [-1, -1, -1, 0, 1, 2]
    assert expert_maps.expert_map(eplb, 0, 6, 2, 1).tolist() == [2, 1, 0, -1, -1, -1]


def manager(rank: int, experts: int = 4, ranks: int = 2):
    parallel = SimpleNamespace(needs_round_robin_routing_tables=False)
    return SimpleNamespace(
        ep_rank=rank, ep_size=ranks, global_num_experts=experts, moe_parallel_config=parallel,
        num_fused_shared_experts=0, rocm_aiter_enabled=False,
    )  # fmt: skip


def test_layers_that_are_built_while_the_draft_loads_get_the_drafts_maps():
    settings = make_settings("eplb", PLAN, 2)
    name = "draft_model.model.layers.0.mlp.experts"
    with drafts.loading(True):
        mine = manager(1)
        expert_maps._place_layer(settings, name, SimpleNamespace(), mine)
        assert mine._expert_map.tolist() == DRAFT.expert_map(0, 1).tolist()
    assert not drafts.loading_draft()
    target = manager(1, 6)
    expert_maps._place_layer(settings, "model.layers.0.mlp.experts", SimpleNamespace(), target)
    assert target._expert_map.tolist() == PLAN.expert_map(0, 1).tolist()


def test_the_weight_filter_reads_what_any_layer_of_the_draft_has_here():
    """A draft's checkpoint numbers its layers otherwise than its modules: by the target's plan, experts were left out."""
    from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

    skip = expert_maps._should_skip_weight(should_skip_weight)
    alike = Placement([[3, 2, 1, 0]] * 2, 4, (2, 2), (0, 1), "eplb", {}, DRAFT)
    settings = make_settings("eplb", alike, 2)
    local = expert_maps.LocalExperts(settings, 4, 2, 0, draft=True)
    needed = {e for row in range(2) for e in DRAFT.local_experts(row, 0).tolist()}
    assert set(local) == needed == {1, 2, 3}
    name = "layers.0.mlp.experts.{}.up_proj.weight"
    assert [skip(name.format(e), local) for e in range(4)] == [True, False, False, False]
    # The fault: of layer 0 of the target, rank 0 has 2 and 3.
    targets = expert_maps.LocalExperts(settings, 4, 2, 0)
    assert skip(name.format(1), targets)
    zigzag = expert_maps.LocalExperts(make_settings("zigzag", WITHOUT, 2), 4, 2, 1, draft=True)
    assert set(zigzag) == {1, 3}


class Layer:
    """A loaded MoE layer of the draft as far as the report looks at it."""

    def __init__(self, expert_map, experts=4, ranks=2):
        from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

        self.expert_map_manager = manager(0, experts, ranks)
        self.expert_map_manager.expert_map = torch.tensor(expert_map)
        self.quant_method = SimpleNamespace(experts_cls=TritonExperts)
        self.moe_config = SimpleNamespace(num_logical_experts=experts)


def layers(*numbers, **how):
    name = "draft_model.model.layers.{}.mlp.experts"
    return {
        name.format(n): Layer(DRAFT.expert_map(i % 2, 0).copy(), **how)
        for i, n in enumerate(numbers)
    }


def test_a_draft_with_rows_must_be_the_one_that_they_are_for():
    settings = make_settings("eplb", PLAN, 2, exact=True)
    loading._report(layers(0, 61), settings, main=False, draft=True)
    for found, message in (
        (layers(0, 5), "layers.5.mlp.experts of the draft is not among the plan's rows"),
        (layers(0), "a row for layer 61 of the draft, whose MoE layers are"),
        ({}, "a row for layer 0 of the draft, whose MoE layers are"),  # a dense draft
        (layers(0, 61, ranks=1), "has 4 experts on 1 EP ranks, the plan's rows for the draft are"),
        (layers(61, 0), "the expert map in force on EP rank 0 is not the plan's"),
    ):
        with pytest.raises(PlacementError, match=message):
            loading._report(found, settings, main=False, draft=True)


def test_a_draft_without_rows_is_checked_against_the_strategy():
    settings = make_settings("zigzag", WITHOUT, 2)
    right = {"draft_model.model.layers.0.mlp.experts": Layer([0, -1, 1, -1])}
    loading._report(right, settings, main=False, draft=True)
    wrong = {"draft_model.model.layers.0.mlp.experts": Layer([0, 1, -1, -1])}
    with pytest.raises(PlacementError, match="is not the plan's"):
        loading._report(wrong, settings, main=False, draft=True)


class Loader:
    """A ``BaseModelLoader`` as far as loading is followed."""

    load_config = SimpleNamespace(load_format="auto")

    def load_weights(self, model):
        pass


@pytest.mark.parametrize("experts, file", [(0, False), (0, True), (4, True)])
def test_a_draft_of_its_own_is_not_taken_for_the_target(monkeypatch, experts, file):
    """Refused until now: a dense draft for having no MoE layer, one with experts for not being in the plan."""
    (target, (config, draft)) = configs("draft_model")
    settings = make_settings("eplb" if file else "zigzag", WITHOUT, 2, exact=file)
    for each in (target[0], config):
        each.additional_config = {KEY: Carried(settings)}
    map_of = [0, 1, -1, -1] if file else [0, -1, 1, -1]
    found = {"draft_model.model.layers.0.mlp.experts": Layer(map_of)} if experts else {}
    monkeypatch.setattr(loading, "routed_layers", lambda model: found)
    seen = []

    def original(self, vllm_config, model_config):
        seen.append(drafts.loading_draft())
        return torch.nn.Module()

    load = loading._load_model(original)
    load(Loader(), config, draft)
    assert seen == [True] and not drafts.loading_draft()
    with pytest.raises(PlacementError, match="no MoE layer of vLLM's own kind|not in the plan"):
        monkeypatch.setattr(loading, "is_draft", lambda *_: False)  # the fault
        load(Loader(), config, draft)


class OwnKind(torch.nn.Module):
    """A draft with a parameter of this shape and no ``RoutedExperts``."""

    def __init__(self, *shape):
        super().__init__()
        self.ws = torch.nn.Parameter(torch.zeros(shape))


@pytest.mark.parametrize("shape, told", [((4, 6, 2), True), ((3, 6, 2), False), ((4, 1, 2), False), ((4, 6), False)])  # fmt: skip
def test_a_draft_with_experts_of_its_own_kind_is_refused(monkeypatch, shape, told):
    """MiniCPM's EAGLE head was served with its experts where vLLM puts them, whatever the flag said."""
    _, (config, draft) = configs("eagle")
    draft.get_num_experts = lambda: 4
    monkeypatch.setattr(loading, "routed_layers", lambda model: {})
    load = loading._load_model(lambda self, vllm_config, model_config: OwnKind(*shape))
    config.additional_config = {KEY: Carried(make_settings("zigzag", WITHOUT, 2))}
    with pytest.raises(PlacementError, match="OwnKind keeps its 4 experts in ws, in no MoE layer") if told else contextlib.nullcontext():  # fmt: skip
        load(Loader(), config, draft)
    # vLLM's own placement, or EPLB, which moves nothing there.
    config.additional_config = {KEY: Carried(make_settings("linear", None, 2))}
    load(Loader(), config, draft)
    config.additional_config = {KEY: Carried(make_settings("zigzag", WITHOUT, 2, eplb=True))}
    load(Loader(), config, draft)


def test_which_model_is_loaded_is_forgotten_when_loading_fails():
    with contextlib.suppress(RuntimeError), drafts.loading(True):
        raise RuntimeError
    assert not drafts.loading_draft()


def test_the_drafts_experts_are_known_before_any_process_starts():
    def shape(method, experts):
        (base, _), *rest = configs(method)
        for _, model in ((base, base.model_config), *rest):
            model.get_num_experts = lambda: experts
        return drafts.draft_shape(base)

    assert shape("draft_model", 4).num_experts == 4 and shape("mtp", 4).name == "draft"
    assert shape("draft_model", 0) is shape("ngram", 4) is shape("none", 4) is None


class Recording:
    """What a draft's recording is told."""

    def __init__(self, last=None):
        self.target, self.told = SimpleNamespace(last_batch=last), []

    def batch(self, tokens, is_prefill):
        self.told.append((tokens.tolist(), is_prefill.tolist()))

    def dummy(self):
        self.told.append("dummy")


def test_the_load_of_a_draft_is_told_apart_by_pass():
    """First the target's batch, then a token of each request; dummy passes count nothing."""
    batch = np.array([5, 1]), np.array([True, False])
    recording = Recording(batch)
    proposer = SimpleNamespace(**{draft_recording.RECORDER: recording})
    determine = draft_recording._determine_batch(lambda self, num_tokens: num_tokens)
    assert [determine(proposer, n) for n in (6, 2)] == [6, 2]
    draft_recording._dummy_run(lambda self: determine(self, 6))(proposer)
    determine(proposer, 2)
    assert recording.told == [
        ([5, 1], [True, False]), ([2], [False]), "dummy", ([2], [False])
    ]  # fmt: skip
    determine(SimpleNamespace(), 3)  # a proposer without a recording


def test_the_passes_of_a_speculator_are_told_apart():
    """The V2 runner's: the target's batch, then a token of each request, also where one CUDA graph has all further passes."""
    own = [p for p in speculator_recording.speculator_patches("") if "own" in p.name]
    dependent = [p for p in speculator_recording.speculator_patches("") if "own" not in p.name]
    batch = SimpleNamespace(
        num_reqs=2,
        num_scheduled_tokens=np.array([5, 1, 9]),
        is_prefilling_np=np.array([True, False, True]),
    )
    for (propose, *decodes), first, given in (
        (dependent, [5, 1], (2, False)),
        (own, [6, 2], (batch, None)),
    ):
        recording = Recording()
        speculator = SimpleNamespace(**{draft_recording.RECORDER: recording})

        def pass_of_a_step(self, input_batch, dummy_run=False, decodes=decodes, given=given):
            assert [d.make(lambda self, *a: a)(self, *given) for d in decodes]
            return "tokens"

        run = propose.make(pass_of_a_step)
        assert run(speculator, batch) == "tokens" == run(speculator, batch, dummy_run=True)
        step = [(first, [True, False])] + [([1, 1], [False, False])] * len(decodes)
        assert recording.told == [*step, "dummy"]
        assert run(SimpleNamespace(), batch) == "tokens"  # without a recording


def test_the_installed_vllm_has_what_the_speculators_recording_relies_on():
    pytest.importorskip("vllm.v1.worker.gpu.spec_decode.target_dependent_ar")
    for patch in speculator_recording.speculator_patches(""):
        patch.optional = False
        assert patch.check() is None


def test_a_speculator_whose_passes_are_not_known_is_named(tmp_path, monkeypatch, caplog):
    """DFlash's: nothing is recorded of the draft, and the log says so."""
    from vllm.v1.worker.gpu.spec_decode.dflash.speculator import DFlashSpeculator
    from vllm.v1.worker.gpu.spec_decode.mtp.speculator import MTPSpeculator

    made = []
    monkeypatch.setattr(
        draft_recording, "LoadRecording", lambda *args: made.append(args) or SimpleNamespace()
    )
    found = {"mtp.layers.0.mlp.experts": Layer([0, -1, 1, -1])}
    monkeypatch.setattr(draft_recording, "routed_layers", lambda model: found)
    record = RecordingSettings(str(tmp_path / "load.safetensors"), 60.0, False, 6)
    caplog.set_level("WARNING", logger="vllm.moe_placement_plugin")
    monkeypatch.setattr(draft_recording.logger, "propagate", True)
    for kind in (MTPSpeculator, DFlashSpeculator):
        speculator = object.__new__(kind)
        speculator.model = torch.nn.Module()
        runner = SimpleNamespace(device="cpu", speculator=speculator)
        draft_recording.bind_draft(record, configs("mtp")[0][0], runner, "target")
        assert hasattr(speculator, draft_recording.RECORDER) == (kind is MTPSpeculator)
    assert len(made) == 1 and "DFlashSpeculator" in caplog.text


def test_a_drafts_load_goes_beside_the_targets(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        draft_recording, "LoadRecording", lambda *args: made.append(args) or SimpleNamespace()
    )
    found = {"mtp.layers.0.mlp.experts": Layer([0, -1, 1, -1])}
    monkeypatch.setattr(draft_recording, "routed_layers", lambda model: found)
    record = RecordingSettings(str(tmp_path / "load.safetensors"), 60.0, True, 6)
    config = configs("mtp")[0][0]
    runner = SimpleNamespace(
        device="cpu", drafter=SimpleNamespace(model=torch.nn.Module()), own="model"
    )
    draft_recording.bind_draft(record, config, runner, "target")
    (settings, _, model, _), kept = made[0], getattr(runner.drafter, draft_recording.RECORDER)
    assert settings.path == str(tmp_path / "load.draft.safetensors") and settings.num_experts == 4
    assert model is runner.drafter.model and kept.target == "target" and not settings.coactivation
    found.clear()  # a dense draft
    draft_recording.bind_draft(record, config, runner, "target")
    draft_recording.bind_draft(record, config, SimpleNamespace(device="cpu"), "target")
    assert len(made) == 1


def test_a_file_of_another_draft_is_refused(tmp_path, monkeypatch):
    found = {"mtp.layers.0.mlp.experts": Layer([0, -1, 1, -1])}
    monkeypatch.setattr(draft_recording, "routed_layers", lambda model: found)
    write(ExpertLoad(np.ones((1, 2, 4))), tmp_path / "load.draft.safetensors")
    runner = SimpleNamespace(device="cpu", drafter=SimpleNamespace(model=torch.nn.Module()))
    record = RecordingSettings(str(tmp_path / "load.safetensors"), 60.0, False, 6)
    with pytest.raises(PlacementError, match="load.draft.safetensors"):
        draft_recording.bind_draft(record, configs("mtp")[0][0], runner, None)
