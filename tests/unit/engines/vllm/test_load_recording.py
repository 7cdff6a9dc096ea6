"""vLLM's side of recording without an engine: which tokens a rank counts in every layout, what is refused, what is patched."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here")

pytestmark = pytest.mark.slow  # imports vLLM
import torch  # noqa: E402

from moe_placement_plugin import PlacementError  # noqa: E402
from moe_placement_plugin.engines.common.settings import RecordingSettings  # noqa: E402
from moe_placement_plugin.engines.vllm import combination, patches, recording, resolve  # noqa: E402
from moe_placement_plugin.engines.vllm.capture_points import capture_points  # noqa: E402
from moe_placement_plugin.recording.counters import LoadCounters  # noqa: E402
from tests.support.vllm_settings import make_settings  # noqa: E402

EXPERTS = 8


def rank(
    dp_rank: int = 0, tp_rank: int = 0, tp_size: int = 1, sequence_parallel: bool = False
) -> recording.LoadRecording:
    """The recording of one rank, without a model."""
    made = object.__new__(recording.LoadRecording)
    made.dp_rank, made.tp_rank, made.tp_size = dp_rank, tp_rank, tp_size
    made.shards = tp_size if sequence_parallel else 1
    made.counters = LoadCounters(1, EXPERTS, 64, "cpu")
    return made


def context(monkeypatch, sizes=None, local_sizes=None):
    metadata = None
    if sizes is not None:
        metadata = SimpleNamespace(
            num_tokens_across_dp_cpu=torch.tensor(sizes), local_sizes=local_sizes
        )
    monkeypatch.setattr(
        "vllm.forward_context.get_forward_context", lambda: SimpleNamespace(dp_metadata=metadata)
    )


def tokens(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, EXPERTS, (count, 2))


def expected(*ids: np.ndarray) -> np.ndarray:
    return sum(np.bincount(i.ravel(), minlength=EXPERTS) for i in ids)


def counted(*ranks: recording.LoadRecording) -> np.ndarray:
    return sum(r.counters.snapshot()[0].sum(axis=(0, 1)) for r in ranks)


def capture(made, real: int, ids: np.ndarray) -> None:
    made.counters.mark(np.array([real]), np.array([False]))
    made.capture(0, torch.from_numpy(ids))


def test_one_rank(monkeypatch):
    context(monkeypatch)
    made, ids = rank(), tokens(6, 0)
    capture(made, 4, ids)  # two rows of padding
    np.testing.assert_array_equal(counted(made), expected(ids[:4]))


# Two data-parallel ranks with 3 and 2 real tokens, both padded to 4.
SIZES, REAL = [4, 4], [3, 2]


def test_data_parallel_ranks_that_route_their_own_tokens(monkeypatch):
    context(monkeypatch, SIZES)
    ranks, ids = [rank(0), rank(1)], [tokens(4, 0), tokens(4, 1)]
    for made, own, real in zip(ranks, ids, REAL):
        capture(made, real, own)
    np.testing.assert_array_equal(counted(*ranks), expected(ids[0][:3], ids[1][:2]))


def test_data_parallel_ranks_that_route_everybodys_tokens(monkeypatch):
    context(monkeypatch, SIZES)
    ranks, ids = [rank(0), rank(1)], [tokens(4, 0), tokens(4, 1)]
    for made, real in zip(ranks, REAL):
        capture(made, real, np.concatenate(ids))
    np.testing.assert_array_equal(counted(*ranks), expected(ids[0][:3], ids[1][:2]))


def test_sequence_parallel_shards(monkeypatch):
    """DP 2 x TP 2, each rank routes half of its data-parallel rank's tokens (5, padded to 6)."""
    context(monkeypatch, [5, 5])
    ids = [tokens(6, 0), tokens(6, 1)]
    ranks = []
    for dp_rank in (0, 1):
        for tp_rank in (0, 1):
            made = rank(dp_rank, tp_rank, 2, True)
            capture(made, 5, ids[dp_rank][tp_rank * 3 : tp_rank * 3 + 3])
            ranks.append(made)
    np.testing.assert_array_equal(counted(*ranks), expected(ids[0][:5], ids[1][:5]))


def test_sequence_parallel_shards_gathered_before_routing(monkeypatch):
    """The same, but every rank routes all shards; they are counted once."""
    context(monkeypatch, [5, 5], local_sizes=[3, 3, 3, 3])
    ids = [tokens(6, 0), tokens(6, 1)]
    ranks = [rank(d, t, 2, True) for d in (0, 1) for t in (0, 1)]
    for made in ranks:
        capture(made, 5, np.concatenate(ids))
    np.testing.assert_array_equal(counted(*ranks), expected(ids[0][:5], ids[1][:5]))


def test_unknown_layout_is_refused(monkeypatch):
    context(monkeypatch, SIZES)
    with pytest.raises(PlacementError, match="layout is not known"):
        capture(rank(), 3, tokens(7, 0))


def config(folder, **changes):
    """As much of a ``VllmConfig`` as the checks read."""
    extra = {"expert_load_record": str(folder / "load")} | changes.pop("extra", {})
    parallel = SimpleNamespace(
        tensor_parallel_size=2, data_parallel_size=1, prefill_context_parallel_size=1,
        enable_expert_parallel=True, enable_eplb=False, use_ubatching=False,
        enable_elastic_ep=False, expert_placement_strategy="linear",
        all2all_backend="allgather_reducescatter",
    )  # fmt: skip
    text = SimpleNamespace(
        num_hidden_layers=4, num_experts=EXPERTS, decoder_sparse_step=1, mlp_only_layers=[]
    )
    model = SimpleNamespace(
        is_moe=True,
        model="tiny",
        architecture="Tiny",
        hf_text_config=text,
        get_num_experts=lambda: EXPERTS,
        enable_return_routed_experts=False,
    )
    for name, value in changes.items():
        target = parallel if hasattr(parallel, name) else model
        assert hasattr(target, name)
        setattr(target, name, value)
    return SimpleNamespace(
        additional_config=extra,
        parallel_config=parallel,
        model_config=model,
        load_config=SimpleNamespace(load_format="auto"),
    )


def asked(folder, **changes):
    """What is to be recorded, once all checks have passed."""
    made = config(folder, **changes)
    request = resolve.read_request(made)
    resolve.check_support(made, request, combination.combination_of(made))
    return recording.recording_settings(made, request)


def test_what_is_recorded(tmp_path):
    made = asked(tmp_path, extra={"expert_load_interval": "5"})
    assert (made.interval, made.num_experts, made.ep_ranks) == (5, EXPERTS, 2)
    assert not made.coactivation
    assert asked(tmp_path, enable_expert_parallel=False).ep_ranks is None
    assert asked(tmp_path, enable_eplb=True).ep_ranks is None
    assert asked(tmp_path, extra={"expert_load_record": None}) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"is_moe": False}, "no Mixture-of-Experts model"),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
        ({"use_ubatching": True}, "--enable-dbo"),
        ({"enable_elastic_ep": True}, "--enable-elastic-ep"),
        ({"enable_return_routed_experts": True}, "--enable-return-routed-experts"),
        ({"extra": {"expert_load_interval": "soon"}}, "--expert-load-interval soon"),
        ({"extra": {"expert_load_record": "/no/such/folder/load"}}, "does not exist"),
        (
            {"extra": {"expert_load_record": None, "expert_load_coactivation": True}},
            "without --expert-load-record",
        ),
    ],
)
def test_what_cannot_be_recorded_is_refused(tmp_path, changes, words):
    with pytest.raises(PlacementError, match=words):
        asked(tmp_path, **changes)


def test_only_what_was_asked_for_is_patched(monkeypatch):
    monkeypatch.setattr("moe_placement_plugin.engines.vllm.detect.is_cpu_build", lambda: False)
    record = RecordingSettings("load", 60.0)
    assert patches.patch_sets(make_settings("linear", None, 2, None)) == []
    assert patches.patch_sets(make_settings("linear", None, 2, record)) == [patches.recording_set()]
    names = {p.name for p in patches.recording_set()}
    assert names and all(name.startswith("record-") for name in names)


def two_in_one_layer(*names: str) -> torch.nn.Module:
    """A model with a MoE of each name, as far as a recording looks at it."""
    from vllm.model_executor.layers.fused_moe.layer import MoERunner
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    class Router(BaseRouter):
        """A router that only takes a callback."""

        __abstractmethods__ = frozenset()

        def set_capture_fn(self, capture):
            self.capture = capture

    Router.__abstractmethods__ = frozenset()
    model = torch.nn.Module()
    for i, name in enumerate(names):
        runner = MoERunner.__new__(MoERunner)
        torch.nn.Module.__init__(runner)
        router = Router.__new__(Router)
        runner.__dict__.update(layer_name=name, router=router)
        quant_method = SimpleNamespace(is_monolithic=False)
        runner.__dict__["routed_experts"] = SimpleNamespace(quant_method=quant_method)
        model.add_module(f"moe{i}", runner)
    return model


def test_two_moes_in_one_layer_are_not_counted_as_one():
    """The second took the first one's row, so that half of the load was missing without a word (ERNIE 4.5 VL)."""
    names = [f"model.layers.{n}.mlp.text_experts" for n in (3, 4)]
    assert list(capture_points(two_in_one_layer(*names))) == [3, 4]
    names.append("model.layers.3.mlp.vision_experts")
    with pytest.raises(PlacementError, match="moe2 is a second MoE in layer 3"):
        capture_points(two_in_one_layer(*names))
