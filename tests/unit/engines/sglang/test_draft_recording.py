"""Record a draft's load apart from the target's, without an engine."""

from __future__ import annotations

import logging
import types

import numpy as np
import pytest
import torch

from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.engines.common.settings import RecordingSettings, Settings
from moe_placement_plugin.engines.sglang import draft_recording, recording
from moe_placement_plugin.engines.sglang.state import STATE
from moe_placement_plugin.formats.plan_or_load import write

from .draft_models import EXPERTS, make_experts, make_model, runner


class Graph:
    """Replay a draft's steps, as far as the recording looks at it."""

    def __init__(self, one):
        self.model_runner = one


def recorded(monkeypatch, tmp_path, algorithm="EAGLE", part=None):
    """Put a draft with a block at ``model.decoder.mlp`` under a recording; return its runner."""
    from sglang.srt import runtime_context
    from sglang.srt.layers.moe.topk import TopK

    wanted = RecordingSettings(str(tmp_path / "load.safetensors"), 60.0, True)
    monkeypatch.setattr(STATE, "settings", Settings(recording=wanted))
    parallel = types.SimpleNamespace(tp_rank=0, pp_rank=0)
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: parallel)
    monkeypatch.setattr(draft_recording, "apply_now", lambda name: None)
    model = make_model(make_experts(0, EXPERTS))
    router = TopK.__new__(TopK)
    torch.nn.Module.__init__(router)
    router.topk_config = types.SimpleNamespace(output_format=None)
    model.model.decoder.mlp.topk = router
    one = runner(part, model=model)
    one.device, one.model_config.context_len = "cpu", 64
    one.server_args = types.SimpleNamespace(
        speculative_algorithm=algorithm,
        speculative_draft_model_path="a/draft",
        pp_size=1,
        tp_size=2,
        ep_size=2,
        dp_size=1,
        chunked_prefill_size=-1,
        max_prefill_tokens=64,
    )
    recording._load_model(lambda self: None, one)
    return one, router


def a_batch(mode: str, size: int, tokens: int, lengths=None):
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    return types.SimpleNamespace(
        forward_mode=ForwardMode[mode],
        batch_size=size,
        positions=torch.zeros(tokens),
        extend_seq_lens_cpu=lengths,
        extend_prefix_lens_cpu=lengths and [0] * size,
        input_ids=torch.zeros(0),
    )


def test_a_drafts_load_is_recorded_apart(monkeypatch, tmp_path):
    """Count tokens of a prompt, verified ones, and one of each branch; in graphs too."""
    one, router = recorded(monkeypatch, tmp_path)
    found = getattr(one, recording.RECORDING)
    monkeypatch.setattr(found.recorder, "served", lambda: None)
    ids = torch.tensor([[0, 5]] * 8, dtype=torch.int32)

    def passes(count=1):
        for _ in range(count):
            recording._post_process(lambda *args: None, ids, None, router.topk_config)

    recording._forward(lambda *args: passes(), one, a_batch("EXTEND", 2, 5, [2, 3]))
    draft_recording._replay(lambda *args: passes(2), Graph(one), a_batch("DECODE", 3, 6))
    draft_recording._replay(lambda *args: passes(), Graph(one), a_batch("DRAFT_EXTEND_V2", 2, 8))
    recording._forward(lambda *args: passes(), one, a_batch("IDLE", 0, 0))
    counts, pairs = found.counters.snapshot()
    assert counts[:, 0].tolist() == [[5, 0, 0, 0, 0, 5], [20, 0, 0, 0, 0, 20]] and pairs is None
    assert found.recorder.path == tmp_path / "load.draft.safetensors"
    assert found.recorder.windows.layer_ids == (3,)
    assert found.recorder.windows.metadata["model"] == "a/draft"


@pytest.mark.parametrize(
    ("algorithm", "part", "why"),
    [("FROZEN_KV_MTP", None, "FROZEN_KV_MTP in graphs of their own"), ("EAGLE", 0, "in graphs of")],
)
def test_a_recording_says_that_it_leaves_a_draft_out(
    monkeypatch, tmp_path, caplog, algorithm, part, why
):
    with caplog.at_level(logging.WARNING):
        one, _ = recorded(monkeypatch, tmp_path, algorithm, part)
    assert "the load of the draft's 1 MoE layers is not recorded" in caplog.text
    assert why in caplog.text and not hasattr(one, recording.RECORDING)


def test_a_dense_draft_is_not_spoken_of(monkeypatch, caplog):
    wanted = RecordingSettings("load.safetensors", 60.0)
    monkeypatch.setattr(STATE, "settings", Settings(recording=wanted))
    dense = runner(model=torch.nn.Linear(1, 1))
    with caplog.at_level(logging.INFO):
        recording._load_model(lambda self: None, dense)
    assert not caplog.text and not hasattr(dense, recording.RECORDING)


def test_a_recording_of_another_draft_is_not_continued(monkeypatch, tmp_path):
    from moe_placement_plugin.core.load import ExpertLoad

    other = ExpertLoad(np.ones((1, 2, EXPERTS)), metadata={"window_start": [0.0]})
    write(other, tmp_path / "load.draft.safetensors")
    with pytest.raises(PlacementError, match="load.draft.safetensors exists and is the recording"):
        recorded(monkeypatch, tmp_path)
