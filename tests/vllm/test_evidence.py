"""What counts as seen: every slot, every weight, by the map; and what a checkpoint may leave out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed in this environment")
import torch  # noqa: E402

from moe_placement_plugin import Placement, PlacementError  # noqa: E402
from moe_placement_plugin.engines.patching import PatchSet  # noqa: E402
from moe_placement_plugin.engines.vllm import evidence, layers, loaded, reload, stacked  # noqa: E402
from moe_placement_plugin.engines.vllm.reload_table import local_copies  # noqa: E402
from moe_placement_plugin.engines.vllm.settings import KEY, PlacementSettings  # noqa: E402

pytestmark = pytest.mark.timeout(300)

EXPERTS, WIDTH = 6, 4


@pytest.fixture(autouse=True)
def watched():
    patches = PatchSet(evidence.evidence_patches())
    patches.apply()
    yield
    patches.undo()


class Manager:
    """One rank's experts as ``ExpertMapManager`` gives them."""

    num_fused_shared_experts = 0

    def __init__(self, mine: list[int], rank: int = 0, physical: int = EXPERTS):
        self.ep_rank, self.ep_size, self.global_num_experts = rank, 2, physical
        self.expert_map = torch.full((physical,), -1, dtype=torch.int32)
        self.expert_map[mine] = torch.arange(len(mine), dtype=torch.int32)

    def map_global_to_local(self, expert: int) -> int:
        return int(self.expert_map[expert])


def layer_of(mine: list[int], rank: int = 0, physical: int = EXPERTS, bias: bool = False):
    """A ``RoutedExperts`` with parameters and nothing else."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    layer = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(layer)
    slots = len(mine)
    layer.layer_name, layer.local_num_experts = "model.layers.0.mlp.experts", slots
    layer.expert_map_manager = Manager(mine, rank, physical)
    layer.quant_method, layer.quant_config = SimpleNamespace(), None
    layer._fused_shared_expert_quantizer, layer._loaded_expert_biases = None, set()
    layer.moe_config = SimpleNamespace(
        num_logical_experts=EXPERTS, is_act_and_mul=True, tp_rank=0, tp_shard_with_padding=False,
        moe_parallel_config=SimpleNamespace(tp_size=1, tp_rank=0),
    )  # fmt: skip
    shapes = {"w13_weight": (2 * WIDTH, WIDTH), "w2_weight": (WIDTH, WIDTH)}
    shapes |= {"w2_bias": (WIDTH,)} if bias else {}
    for name, shape in shapes.items():
        layer.register_parameter(name, torch.nn.Parameter(torch.zeros(slots, *shape), False))
    return layer


def weights(seed: int = 0) -> dict[tuple[int, str], torch.Tensor]:
    torch.manual_seed(seed)
    return {(e, s): torch.randn(WIDTH, WIDTH) for e in range(EXPERTS) for s in ("w1", "w2", "w3")}


def load(layer, checkpoint, experts=range(EXPERTS), shards=("w1", "w2", "w3")) -> None:
    for expert in experts:
        for shard in shards:
            name = "w2_weight" if shard == "w2" else "w13_weight"
            layer.weight_loader(getattr(layer, name), checkpoint[expert, shard], f"x.{name}", shard, expert)  # fmt: skip


def test_moved_slots_compares_the_first_expert_too():
    assert not layers.moved_slots(layer_of([0, 1, 2]))
    assert not layers.moved_slots(layer_of([3, 4, 5], rank=1))
    assert layers.moved_slots(layer_of([3, 4, 5])), "consecutive, but another rank's block"
    assert layers.moved_slots(layer_of([0, 2, 4])) and layers.moved_slots(layer_of([1, 0, 2]))
    assert layers.moved_slots(layer_of([0, 1])), "less than the engine would put here"


@pytest.mark.parametrize("moved", [True, False])
def test_all_experts_one_at_a_time_pass(moved):
    layer = layer_of([1, 3, 5])
    evidence.watch(layer, moved)
    load(layer, weights())
    evidence.check_evidence(layer)
    assert evidence.EVIDENCE not in vars(layer)


FAULTS = {
    "nothing": (lambda la, w: None, "nothing was seen to be put into w13_weight by the map"),
    "one expert missing": (
        lambda la, w: load(la, w, experts=[0, 1, 2, 4, 5]),
        r"brought w13_weight \(w1\) for 2 of 3 slots .* slot 1 \(expert 3\) was never filled",
    ),
    "w1 without w3": (
        lambda la, w: load(la, w, shards=("w1", "w2")),
        "only its part w1 was seen to be put into w13_weight",
    ),
    "w13 without w2": (
        lambda la, w: load(la, w, shards=("w1", "w3")),
        "nothing was seen to be put into w2_weight",
    ),
    "copied by position": (
        lambda la, w: [p.data.normal_() for p in la.parameters()],
        "nothing was seen to be put into w13_weight",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_less_than_all_is_refused(fault):
    layer = layer_of([1, 3, 5])
    evidence.watch(layer, True)
    put, message = FAULTS[fault]
    put(layer, weights())
    with pytest.raises(PlacementError, match=message):
        evidence.check_evidence(layer)


def test_the_engines_own_order_needs_no_evidence_of_what_it_copies_at_once():
    layer = layer_of([0, 1, 2])
    evidence.watch(layer, False)
    for parameter in layer.parameters():
        parameter.data.normal_()
    evidence.check_evidence(layer)


def test_a_bias_that_nothing_brings_may_stay_and_one_that_came_by_position_may_not():
    layer = layer_of([1, 3, 5], bias=True)
    evidence.watch(layer, True)
    load(layer, weights())
    getattr(layer, evidence.EVIDENCE).settle(layer)
    evidence.check_evidence(layer)
    for rows, refused in ((torch.ones(WIDTH).expand(3, -1), False), (torch.randn(3, WIDTH), True)):
        layer = layer_of([1, 3, 5], bias=True)
        evidence.watch(layer, True)
        load(layer, weights())
        layer.w2_bias.data.copy_(rows)
        if refused:
            with pytest.raises(PlacementError, match="w2_bias of many experts was copied at once"):
                getattr(layer, evidence.EVIDENCE).settle(layer)
        else:  # the same for all experts: it does not matter where they lie
            getattr(layer, evidence.EVIDENCE).settle(layer)


def test_a_signature_adds_up_and_knows_no_order_but_every_other_difference():
    rows = torch.randn(5, 8, 6)
    whole = evidence.signature(rows)
    assert whole.equal(sum(evidence.signature(part) for part in rows.chunk(2, dim=1)))
    assert whole.equal(evidence.signature(rows.transpose(1, 2)))
    padded = torch.zeros(5, 9, 9)
    padded[:, :8, :6] = rows
    assert whole.equal(evidence.signature(padded))
    assert len({tuple(row) for row in whole.tolist()}) == 5
    rows[2, 3, 4] *= -1
    assert whole.ne(evidence.signature(rows)).any(dim=1).tolist() == [False, False, True] + 2 * [
        False
    ]
    for dtype in (torch.uint8, torch.float8_e4m3fn, torch.bfloat16):
        assert evidence.signature(torch.ones(2, 3).to(dtype)).shape == (2, 2)


NAME = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    "mine, rank, picks",
    [([5, 0, 3], 0, "block"), ([2, 1, 4], 1, "block"), ([5, 0, 3], 0, "ascending")],
)
def test_rows_are_where_the_model_looks_for_them(mine, rank, picks):
    layer = layer_of(mine, rank)
    whole = torch.randn(EXPERTS, 2, 3)
    ((name, found),) = stacked.rows_in_order(
        [(NAME, whole)], {layer.layer_name: layer}, {layer.layer_name: picks}
    )
    rows = range(3 * rank, 3 * rank + 3) if picks == "block" else sorted(mine)
    assert name == NAME and found[list(rows)].equal(whole[mine])


def test_a_model_that_takes_one_expert_at_a_time_gets_its_own():
    layer = layer_of([5, 0, 3, 1])
    whole = torch.randn(EXPERTS, 2, 3)
    found = list(
        stacked.rows_in_order(
            [(NAME + "_blocks", whole), ("model.layers.0.mlp.router.weight", whole[0])],
            {layer.layer_name: layer}, {}, frozenset({layer.layer_name}),
        )
    )  # fmt: skip
    assert [name for name, _ in found] == [
        *(f"model.layers.0.mlp.experts.{e}.gate_up_proj_blocks" for e in (5, 0, 3, 1)),
        "model.layers.0.mlp.router.weight",
    ]
    assert all(t.equal(whole[e]) for (_, t), e in zip(found, (5, 0, 3, 1)))


def test_ranks_of_unequal_size_are_refused_for_a_model_that_copies_equal_parts():
    layer = layer_of([5, 0, 3, 1])
    with pytest.raises(PlacementError, match="copied in 2 equal parts.*holds 4 of 6 experts"):
        stacked.permuted(layer, NAME, torch.randn(EXPERTS, 2), "block")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.3.gate_proj.weight",
        "model.layers.0.mlp.shared_experts.gate_proj.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.experts.e_score_correction_bias",
        "model.layers.1.mlp.experts.gate_up_proj",
    ],
)
def test_other_tensors_are_left_alone(name):
    layer = layer_of([5, 0, 3])
    assert stacked.stacked_layer(name, torch.ones(EXPERTS, 2), {"x": layer}) is None
    assert stacked.stacked_layer(NAME, torch.ones(EXPERTS, 2), {layer.layer_name: layer}) is layer
    assert stacked.stacked_layer(NAME, torch.ones(4, 2), {layer.layer_name: layer}) is None


def eplb_layer(table: list[int], rank: int):
    """A layer of which EPLB has moved experts: 6 experts, 8 slots, 4 a rank."""
    layer = layer_of(list(range(4 * rank, 4 * rank + 4)), rank, physical=8)
    state = SimpleNamespace(physical_to_logical_map=torch.tensor([table]))
    object.__setattr__(layer, layers.EPLB_ROW, (state, 0))
    return layer


def test_new_weights_go_to_the_slots_of_the_table_in_force():
    table = [4, 1, 0, 5, 1, 2, 3, 4]
    checkpoint = weights(3)
    for rank in range(2):
        layer = eplb_layer(table, rank)
        # As a model loads: all copies of vLLM's first table, 0..5 and then 0, 1 again.
        for physical in range(8):
            for shard in ("w1", "w2", "w3"):
                name = "w2_weight" if shard == "w2" else "w13_weight"
                layer.weight_loader(getattr(layer, name), checkpoint[physical % 6, shard], name, shard, physical)  # fmt: skip
        for slot, expert in enumerate(table[4 * rank : 4 * rank + 4]):
            assert layer.w2_weight[slot].equal(checkpoint[expert, "w2"])
            both = torch.cat([checkpoint[expert, "w1"], checkpoint[expert, "w3"]])
            assert layer.w13_weight[slot].equal(both)
    first = eplb_layer([0, 1, 2, 3, 4, 5, 0, 1], 1)
    assert local_copies(first, 6, "w2_weight") == (6,), "vLLM's own way while its table stands"


class Model(torch.nn.Module):
    """A model of one MoE layer, as far as updates look at it."""

    def __init__(self, layer):
        super().__init__()
        self.experts = layer


def served(layer):
    model = Model(layer)
    object.__setattr__(model, reload._UPDATES, reload.Updates())
    return model


def test_new_weights_are_refused_while_old_ones_are_on_their_way():
    layer = eplb_layer([0, 1, 2, 3, 4, 5, 0, 1], 0)
    model, state = served(layer), getattr(layer, layers.EPLB_ROW)[0]
    assert reload.enter_update(model) and reload.updates_of(model).count == 1
    state.rebalanced = True
    with pytest.raises(PlacementError, match="no weight was changed; serve a few more requests"):
        reload.enter_update(model)
    assert reload.updates_of(model).count == 1
    state.rebalanced, state.pending_result = False, object()
    with pytest.raises(PlacementError, match="in the background"):
        reload.begin(model)


def test_rows_by_position_are_refused_for_a_model_that_is_given_them_directly():
    layer = eplb_layer([4, 1, 0, 5, 1, 2, 3, 4], 0)
    rows = torch.randn(4, WIDTH, WIDTH)
    with pytest.raises(PlacementError, match="come by position, past the placement"):
        layer.weight_loader(layer.w2_weight, rows, "x.w2_weight", "w2", 0)
    object.__setattr__(layer, evidence.IN_ORDER, "ascending")
    layer.weight_loader(layer.w2_weight, rows, "x.w2_weight", "w2", 0)


def test_a_worker_computes_nothing_between_a_wrong_update_and_a_whole_one():
    model = served(layer_of([1, 3, 5]))
    parallel = SimpleNamespace(data_parallel_size=1)
    worker = SimpleNamespace(
        vllm_config=SimpleNamespace(parallel_config=parallel),
        model_runner=SimpleNamespace(get_model=lambda: model),
    )
    for whole in (False, True):
        reload.begin(model)
        for name, parameter in list(model.experts._parameters.items()):
            model.experts._parameters[name] = torch.nn.Parameter(parameter.to("meta"), False)
        load(model.experts, weights(), experts=range(6) if whole else [3])
        if whole:
            reload._finish_worker(worker, {"verify": "off"})
            assert not hasattr(worker, "execute_model")
        else:
            with pytest.raises(PlacementError, match="was never filled"):
                reload._finish_worker(worker, {"verify": "off"})
            with pytest.raises(PlacementError, match="no whole one has come since"):
                worker.execute_model(None)


def test_new_weights_end_what_was_verified():
    layer = layer_of([1, 3, 5])
    object.__setattr__(layer, layers.EXPECTED, (0, {}))
    model = served(layer)
    reload.begin(model)
    assert not hasattr(layer, layers.EXPECTED) and reload.updates_of(model).active


def test_part_of_a_layer_may_be_updated_in_place_but_not_in_one_that_is_made_anew():
    for meta in (False, True):
        layer = layer_of([1, 3, 5])
        model = served(layer)
        reload.begin(model)
        if meta:  # as layerwise reloading does
            for name, parameter in list(layer._parameters.items()):
                layer._parameters[name] = torch.nn.Parameter(parameter.to("meta"), False)
        load(layer, weights(), experts=[3])
        settings = {"verify": "off"}
        if meta:
            with pytest.raises(PlacementError, match="was never filled"):
                reload.finish(model, settings, alone=True)
        else:
            reload.finish(model, settings, alone=True)
        assert not reload.updates_of(model).active


@pytest.mark.parametrize("moved", [True, False])
def test_the_kernels_format_is_refused_where_slots_moved(moved):
    model = served(layer_of([1, 3, 5] if moved else [0, 1, 2]))
    if moved:
        with pytest.raises(PlacementError, match="is_checkpoint_format=False.*no weight was changed"):  # fmt: skip
            reload._refuse_kernel_format(model, False)
    else:
        reload._refuse_kernel_format(model, False)
    reload._refuse_kernel_format(model, True)
    reload._refuse_kernel_format(model, None)


def test_a_gpt_oss_that_would_keep_its_old_experts_is_refused_before_an_update():
    model = served(layer_of([1, 3, 5]))
    model.inner = type("GptOssModel", (torch.nn.Module,), {})()
    with pytest.raises(PlacementError, match="restart the server with the new checkpoint"):
        reload._refuse_stacked_copies(model)
    model.inner._try_load_streamed_expert = lambda *args: None
    reload._refuse_stacked_copies(model)


@pytest.mark.parametrize("counts, active, allowed", [((1, 1), False, True), ((1, 2), False, False), ((1, 1), True, False)])  # fmt: skip
def test_a_rebalance_waits_until_all_ranks_have_the_same_weights(monkeypatch, counts, active, allowed):  # fmt: skip
    import torch.distributed as dist
    from vllm.distributed import parallel_state

    model = served(layer_of([1, 3, 5]))
    mine = reload.updates_of(model)
    mine.count = mine.verified = mine.viewed = counts[0]

    def all_reduce(tensor, op, group):
        other = torch.tensor([active, 0, 0, counts[1], -counts[1]])
        tensor.copy_(torch.maximum(tensor, other))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel_state, "get_ep_group", lambda: SimpleNamespace(cpu_group=None))
    eplb = SimpleNamespace(model_states={"m": SimpleNamespace(model=model)})
    assert reload.may_rearrange(eplb, None) is allowed


def test_views_of_parameters_that_were_made_anew_are_never_moved(monkeypatch):
    import torch.distributed as dist

    from moe_placement_plugin.engines.vllm import eplb_exchange

    layer = layer_of([0, 1, 2])
    model = Model(layer)
    model.expert_weights = [list(layer.get_expert_weights())]
    state, adopted = SimpleNamespace(model=model), []
    setattr(state, eplb_exchange.EXCHANGER, object())
    setattr(state, eplb_exchange._ADOPTED, (1, 2.0, True))
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, op, group: None)
    monkeypatch.setattr(eplb_exchange, "adopt", lambda eplb, state, *more: adopted.append(more))
    monkeypatch.setattr(eplb_exchange, "settle", lambda eplb, state: None)
    eplb_exchange.look_again(None, state, None)
    assert adopted == []
    layer.w2_weight = torch.nn.Parameter(torch.randn(3, WIDTH, WIDTH), False)
    listed = model.expert_weights
    eplb_exchange.look_again(None, state, None)
    assert adopted == [(1, 2.0, True)] and model.expert_weights is listed
    places = {t.data_ptr() for t in listed[0]}
    assert layer.w2_weight.data_ptr() in places


@pytest.mark.parametrize("level, eplb, refused", [(2, True, True), (1, True, False), (2, False, False)])  # fmt: skip
def test_a_sleep_that_forgets_eplbs_tables_is_refused(level, eplb, refused):
    model = served(layer_of([1, 3, 5]))
    runner = SimpleNamespace(get_model=lambda: model)
    config = SimpleNamespace(additional_config={KEY: PlacementSettings.make("eplb", None, 2, eplb=eplb)})  # fmt: skip
    worker, slept = SimpleNamespace(vllm_config=config, model_runner=runner), []
    sleep = reload._sleep(lambda self, level: slept.append(level))
    if refused:
        with pytest.raises(PlacementError, match="sleep at level 1"):
            sleep(worker, level)
    else:
        sleep(worker, level)
    assert slept == ([] if refused else [level])


@pytest.mark.parametrize("looked_at", [True, False])
def test_a_model_that_was_never_looked_at_is_refused(looked_at):
    model = Model(layer_of([1, 3, 5]))
    if looked_at:
        reload.serve(model)
    plan = Placement([[1, 3, 5, 0, 2, 4]], 6, (3, 3))
    config = SimpleNamespace(
        additional_config={KEY: PlacementSettings.make("zigzag", plan, 2)},
        load_config=SimpleNamespace(load_format="gguf"),
    )
    runner = SimpleNamespace(get_model=lambda: model)
    load = loaded._worker_load_model(lambda self: None)
    worker = SimpleNamespace(vllm_config=config, model_runner=runner)
    if looked_at:
        load(worker)
    else:
        with pytest.raises(PlacementError, match="--load-format gguf loaded Model in a way of its own"):  # fmt: skip
            load(worker)


@pytest.mark.parametrize(
    "other, exact, message",
    [
        ({"model.layers.1.mlp.experts": (1, 6)}, True, None),
        ({}, True, "the plan has layer 1"),
        ({}, False, None),
    ],
)
def test_pipeline_stages_are_checked_together(monkeypatch, other, exact, message):
    import torch.distributed as dist
    from vllm.distributed import parallel_state

    def gather(parts, mine, group):
        parts[:] = [mine, other]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    group = SimpleNamespace(world_size=2, cpu_group=None)
    monkeypatch.setattr(parallel_state, "get_pp_group", lambda: group)
    plan = Placement([[1, 3, 5, 0, 2, 4]] * 2, 6, (3, 3), (0, 1))
    settings = PlacementSettings.make("eplb", plan, 2, exact=exact)
    mine = {"model.layers.0.mlp.experts": (0, 6)}
    if message is None:
        loaded._check_coverage(loaded._of_all_stages(mine), settings)
    else:
        with pytest.raises(PlacementError, match=message):
            loaded._check_coverage(loaded._of_all_stages(mine), settings)
    other.clear()
    with pytest.raises(PlacementError, match="no MoE layer of vLLM's own kind"):
        loaded._report({}, settings, True, stages=2)
