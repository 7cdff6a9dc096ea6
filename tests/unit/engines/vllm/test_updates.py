"""Test new weights for layers that serve: by the table in force, refused, or waited for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed in this environment")
import torch  # noqa: E402

from moe_placement_plugin import PlacementError  # noqa: E402
from moe_placement_plugin.engines.vllm import (  # noqa: E402
    evidence,
    layers,
    reload,
    reload_core,
    reload_worker,
    support,
    weight_transfer,
)
from moe_placement_plugin.engines.vllm.reload_table import (  # noqa: E402
    FIRST_COPIES,
    local_copies,
)
from moe_placement_plugin.engines.vllm.state import KEY, Carried  # noqa: E402
from tests.support.vllm_layers import (  # noqa: E402
    WIDTH,
    Model,
    eplb_layer,
    layer_of,
    load,
    served,
    weights,
)
from tests.support.vllm_settings import make_settings  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("loading_is_watched"),
]


def test_new_weights_go_to_the_slots_of_the_table_in_force():
    table = [4, 1, 0, 5, 1, 2, 3, 4]
    checkpoint = weights(3)
    for rank in range(2):
        layer = eplb_layer(table, rank)
        # As a model loads: all copies of vLLM's first table, 0..5 and then 0, 1 again.
        for physical in range(8):
            for shard in ("w1", "w2", "w3"):
                name = "w2_weight" if shard == "w2" else "w13_weight"
                layer.weight_loader(
                    getattr(layer, name), checkpoint[physical % 6, shard], name, shard, physical
                )
        for slot, expert in enumerate(table[4 * rank : 4 * rank + 4]):
            assert layer.w2_weight[slot].equal(checkpoint[expert, "w2"])
            both = torch.cat([checkpoint[expert, "w1"], checkpoint[expert, "w3"]])
            assert layer.w13_weight[slot].equal(both)
    first = eplb_layer([0, 1, 2, 3, 4, 5, 0, 1], 1)
    assert local_copies(first, 6, "w2_weight") == (6,), "vLLM's own way while its table stands"


def test_replicas_that_a_model_does_not_bring_are_filled_from_the_first_copies():
    checkpoint = weights(3)
    for rank in range(2):
        layer = eplb_layer([0, 1, 2, 3, 4, 5, 0, 1], rank)
        object.__setattr__(layer, FIRST_COPIES, True)
        for expert in range(6):
            layer.weight_loader(
                layer.w2_weight, checkpoint[expert, "w2"], "w2_weight", "w2", expert
            )
        for slot, expert in enumerate([(0, 1, 2, 3), (4, 5, 0, 1)][rank]):
            assert layer.w2_weight[slot].equal(checkpoint[expert, "w2"])
    assert local_copies(layer, 6, "w2_weight") == (), "it has arrived with the first copy"


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
            reload_worker._finish_worker(worker, make_settings("eplb", None, 2))
            assert not hasattr(worker, "execute_model")
        else:
            with pytest.raises(PlacementError, match="was never filled"):
                reload_worker._finish_worker(worker, make_settings("eplb", None, 2))
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
        settings = make_settings("eplb", None, 2)
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
        with pytest.raises(
            PlacementError, match="is_checkpoint_format=False.*no weight was changed"
        ):
            reload_worker._refuse_kernel_format(model, False)
    else:
        reload_worker._refuse_kernel_format(model, False)
    reload_worker._refuse_kernel_format(model, True)
    reload_worker._refuse_kernel_format(model, None)


def test_a_gpt_oss_that_would_keep_its_old_experts_is_refused_before_an_update():
    model = served(layer_of([1, 3, 5]))
    model.inner = type("GptOssModel", (torch.nn.Module,), {})()
    with pytest.raises(PlacementError, match="restart the server with the new checkpoint"):
        reload_worker._refuse_stacked_copies(model)
    model.inner._try_load_streamed_expert = lambda *args: None
    reload_worker._refuse_stacked_copies(model)


@pytest.mark.parametrize(
    "counts, active, allowed",
    [((1, 1), False, True), ((1, 2), False, False), ((1, 1), True, False)],
)
def test_a_rebalance_waits_until_all_ranks_have_the_same_weights(
    monkeypatch, counts, active, allowed
):
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
    from moe_placement_plugin.engines.vllm.state import STATE, Eplb, EplbModel

    layer = layer_of([0, 1, 2])
    model = Model(layer)
    model.expert_weights = [list(layer.get_expert_weights())]
    server, state, first, second = object(), SimpleNamespace(model=model), object(), object()
    known = EplbModel(state, exchanger=first)
    monkeypatch.setattr(STATE, "eplb", Eplb(server, 30.0, None, [known]))
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, op, group: None)
    monkeypatch.setattr(eplb_exchange, "_exchanger_of", lambda eplb, state: second)
    monkeypatch.setattr(eplb_exchange, "reserve_staging", lambda eplb, model: None)
    eplb_exchange.look_again(server, state, None)
    assert known.exchanger is first
    layer.w2_weight = torch.nn.Parameter(torch.randn(3, WIDTH, WIDTH), False)
    listed = model.expert_weights
    eplb_exchange.look_again(server, state, None)
    assert known.exchanger is second and model.expert_weights is listed
    places = {t.data_ptr() for t in listed[0]}
    assert layer.w2_weight.data_ptr() in places


@pytest.mark.parametrize(
    "level, eplb, refused", [(2, True, True), (1, True, False), (2, False, False)]
)
def test_a_sleep_that_forgets_eplbs_tables_is_refused(level, eplb, refused):
    model = served(layer_of([1, 3, 5]))
    runner = SimpleNamespace(get_model=lambda: model)
    config = SimpleNamespace(
        additional_config={KEY: Carried(make_settings("eplb", None, 2, eplb=eplb))}
    )
    worker, slept = SimpleNamespace(vllm_config=config, model_runner=runner), []
    sleep = reload_worker._sleep(lambda self, level: slept.append(level))
    if refused:
        with pytest.raises(PlacementError, match="sleep at level 1"):
            sleep(worker, level)
    else:
        sleep(worker, level)
    assert slept == ([] if refused else [level])


class Core:
    """Stand for an engine core with two workers, of which the second has experts on their way."""

    def __init__(self, moving: bool):
        config = SimpleNamespace(
            additional_config={KEY: Carried(make_settings("eplb", None, 2, eplb=True))}
        )
        self.vllm_config, self.model_executor = config, self
        self.paused, self.called, self.workers = False, [], []
        for on_their_way in (False, moving):
            layer = layer_of([1, 3, 5])
            state = SimpleNamespace(rebalanced=on_their_way, pending_result=None)
            state.physical_to_logical_map = torch.tensor([[0, 1, 2, 3, 4, 5]])
            object.__setattr__(layer, layers.EPLB_ROW, (state, 0))
            runner = SimpleNamespace(model=served(layer))
            self.workers.append(SimpleNamespace(vllm_config=config, model_runner=runner))

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        if not callable(method):
            self.called.append(method)
            return None
        return [method(worker, *args, **(kwargs or {})) for worker in self.workers]

    def sleep(self, level):
        """Pause first, as vLLM's does, and do not resume when a worker refuses."""
        self.paused = True


@pytest.mark.parametrize("method", ["reload_weights", "start_weight_update", "sleep"])
@pytest.mark.parametrize("moving", [True, False])
def test_what_a_worker_would_refuse_is_refused_before_anything_begins(method, moving):
    """The fault left a server's scheduler paused, and answers of other workers in queues."""
    core = Core(moving)

    def call():
        if method == "sleep":
            reload_core._sleep(Core.sleep)(core, 1)
        else:
            reload_core._collective_rpc(Core.collective_rpc)(core, method)

    if not moving:
        call()
        assert core.paused or core.called == [method]
        return
    with pytest.raises(PlacementError, match="in the background"):
        call()
    assert not core.paused and core.called == []
    reload_core._sleep(Core.sleep)(core, 0)
    assert core.paused, "pausing alone needs no worker"


@pytest.mark.parametrize("backend", ["nccl", "ipc", "nccl_m2n", "modelexpress", "sparse_nccl"])
def test_a_trainers_back_end_that_goes_past_the_map_is_refused_before_the_start(backend):
    named = support.Combination(transfer=backend)
    flag = "--expert-placement-strategy zigzag"
    if backend in weight_transfer.BY_THE_LOADER:
        support.check(support.PLACEMENT_RULES, named, flag)
        return
    with pytest.raises(PlacementError, match=f"{flag} with .*backend {backend}"):
        support.check(support.PLACEMENT_RULES, named, flag)


def test_every_back_end_of_the_installed_vllm_is_known():
    """A new one must be read before it is let through."""
    factory = pytest.importorskip("vllm.distributed.weight_transfer.factory")
    registered = set(factory.WeightTransferEngineFactory._registry)
    assert registered <= {*weight_transfer.BY_THE_LOADER, *weight_transfer.PAST_THE_LOADER}
    for name in registered & set(weight_transfer.BY_THE_LOADER):
        made = factory.WeightTransferEngineFactory._registry[name]()
        assert made.__name__ == weight_transfer.BY_THE_LOADER[name]


def test_an_engine_of_someone_elses_is_refused():
    class NCCLWeightTransferEngine:
        pass

    class Own(NCCLWeightTransferEngine):
        pass

    weight_transfer.check_engine(Own())
    weight_transfer.check_engine(None)
    with pytest.raises(PlacementError, match="no weight was changed"):
        weight_transfer.check_engine(SimpleNamespace())
