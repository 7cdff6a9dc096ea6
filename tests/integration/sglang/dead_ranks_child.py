"""Run four ranks of SGLang on the CPU in a child process, of which two are killed.

They have their real model, loader, EPLBManager and ExpertLocationUpdater.

    python -m tests.integration.sglang.dead_ranks_child MODEL RESULTS.json
    python -m tests.integration.sglang.dead_ranks_child MODEL RESULTS.json 8

With 8 there are eight ranks, of which four are killed one after the other.

Each step also says how long it took, and how long SGLang's own full reload of the model took
afterwards (``update_weights_from_disk``, to which it goes for every lost expert of every model but
DeepSeek).

SGLang's elastic EP needs mooncake's process groups, which no CPU machine has: here the groups are
gloo, nobody runs a forward pass after a death (its all-reduces would wait for the dead), the
recorded load is given, and ``active_ranks`` is set by hand as mooncake's kernels would. What
follows is SGLang's own: `maybe_rebalance_after_rank_fault`, the manager's rebalance, the updater,
the model's ``load_weights``.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

from tests.support.rebalance_rules import ANY_GAIN_AND_PHASE
from tests.support.warm_workers import WarmContext

RANKS = 4
STEPS = (
    ("skewed", ()),
    ("after one death", (3,)),
    ("after the death of the store's rank", (0,)),
    ("another load", ()),
)
"""Name of each rebalance and who dies before it."""

STEPS_OF_EIGHT = (
    ("skewed", ()),
    ("1 dead", (7,)),
    ("2 dead", (0,)),
    ("3 dead", (4,)),
    ("4 dead", (2,)),
    ("another load", ()),
)


def counts(step: int, layers: int, experts: int):
    """Draw a load ``[forward passes, layers, experts]``, the same on all ranks."""
    import numpy as np

    rng = np.random.default_rng(step)
    return rng.zipf(1.3, (6, layers, experts)).clip(max=500)


class Recorder:
    """Stand in for SGLang's recorder, whose dump is an all-reduce over dead ranks too."""

    recording = True

    def __init__(self, layers: int, experts: int):
        self.step, self.shape = 0, (layers, experts)

    def dump_record(self, output_mode: str):
        import torch

        return {
            "logical_count": torch.from_numpy(counts(self.step, *self.shape)),
            "average_utilization_rate_over_window": None,
        }


def _publish(server_args, rank: int) -> None:
    """Install the configuration in this process, as SGLang 0.5.16, 0.5.20 and 0.5.23 do."""
    from sglang.srt import runtime_context

    if not hasattr(runtime_context, "publish"):
        runtime_context.get_context().set_server_args(server_args)
    elif not hasattr(runtime_context, "SpawnRanks"):
        runtime_context.publish(server_args, role="scheduler")
    else:
        ranks = runtime_context.SpawnRanks(
            world_rank=runtime_context.spawn_world_rank(server_args, tp_rank=rank, pp_rank=0),
            gpu_id=rank,
        )
        runtime_context.publish(server_args, role="scheduler", ranks=ranks)


def start(server_args, port_args, rank: int):
    """Do what a scheduler process does up to the loaded model."""
    # By which a plugin knows a process with a model.
    import sglang.srt.managers.scheduler  # noqa: F401
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.benchmark import one_batch
    from sglang.srt.utils import configure_logger

    _publish(server_args, rank)
    for name in (
        "initialize_moe_config",
        "initialize_fp8_gemm_config",
        "initialize_fp4_gemm_config",
    ):
        initialize = getattr(one_batch, name)
        initialize(
            *[server_args][: len(inspect.signature(initialize).parameters)]
        )  # 0.5.16 wants them
    configure_logger(server_args, prefix=f" TP{rank} EP{rank}")
    made = []
    real = one_batch.ModelRunner

    class Stop(Exception):
        pass

    def runner(**kwargs):
        made.append(real(**kwargs))
        raise Stop

    one_batch.ModelRunner = runner
    try:
        one_batch.load_model(server_args, port_args, rank, rank)
    except Stop:
        return made[0]


def wrong_slots(runner, folder: str) -> list[tuple[int, int]]:
    """Return layer and slot of this rank's slots that do not hold their expert.

    Experts are told by the checkpoint's own names.
    """
    from sglang.srt.runtime_context import get_parallel

    from moe_placement_plugin.exchange.checkpoint import Checkpoint, hugging_face_experts

    checkpoint = Checkpoint(folder)
    locate = hugging_face_experts(checkpoint)
    held = tables(runner)["held"]
    wrong = []
    for layer, (first, down) in runner.model.routed_experts_weights_of_layer.items():
        half = first.shape[1] // 2  # the CPU engine makes experts wider, filled up behind each part
        for slot in range(first.shape[0]):
            expert = held[layer][get_parallel().moe_ep_rank * first.shape[0] + slot]
            part = {role: checkpoint.read(source) for role, source in locate(layer, expert).items()}
            width = part["gate"].shape[0]
            here = {
                "gate": first[slot, :width],
                "up": first[slot, half : half + width],
                "down": down[slot, :, :width],
            }
            if not all(tensor.equal(part[role]) for role, tensor in here.items()):
                wrong.append((layer, slot))
    return wrong


def tables(runner) -> dict:
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    metadata = get_global_expert_location_metadata()
    return {
        "held": metadata.physical_to_logical_map.tolist(),
        "slots_of": metadata.logical_to_all_physical_map.tolist(),
    }


def reload(runner, folder: str) -> float | str:
    """Return the seconds of SGLang's own full reload; or why it cannot be had."""
    began = time.perf_counter()
    done, message = runner.weight_updater.update_weights_from_disk(folder, "auto")
    return time.perf_counter() - began if done else message


def last_report(eplb):
    """What this rank's last exchange did; None before the first."""
    return None if eplb.exchanger is None else eplb.exchanger.last


def rank_process(server_args, port_args, rank: int, ranks: int, folder: str, pipe) -> None:
    """Run one rank: load, then rebalance whenever it is told who is dead."""
    try:
        runner = start(server_args, port_args, rank)
        import torch
        from sglang.srt.elastic_ep.elastic_ep import (
            ElasticEPStateManager,
            maybe_rebalance_after_rank_fault,
        )
        from sglang.srt.eplb import eplb_manager
        from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

        from moe_placement_plugin.engines.sglang.state import STATE
        from moe_placement_plugin.rebalancing.rebalancer import Rebalancer

        proposals, propose = [], Rebalancer.propose

        def noted(*args):
            proposals.append(propose(*args))
            return proposals[-1]

        Rebalancer.propose = noted
        state = ElasticEPStateManager._build_state(ep_size=ranks, device=torch.device("cpu"))
        ElasticEPStateManager._instance = state
        at = get_global_expert_location_metadata()
        recorder = Recorder(at.num_layers, at.num_logical_experts)
        eplb_manager.get_global_expert_distribution_recorder = lambda: recorder
        pipe.send({"wrong": wrong_slots(runner, folder), **tables(runner)})
        while True:
            step, dead = pipe.recv()
            recorder.step = step
            before = last_report(STATE.eplb)
            began = time.perf_counter()
            for gone in dead:
                state.active_ranks[gone] = 0
            if dead:
                assert maybe_rebalance_after_rank_fault(eplb_manager=runner.eplb_manager)
            else:
                list(runner.eplb_manager.rebalance())
            taken = time.perf_counter() - began
            report = last_report(STATE.eplb)
            report = None if report is before else report  # of this step
            wrong = wrong_slots(runner, folder)
            again = reload(runner, folder)
            seen = {
                "wrong": wrong,
                "after reload": wrong_slots(runner, folder),
                "seconds": taken,
                "reload": again,
                **tables(runner),
            }
            decision = proposals[-1].decision
            seen |= {"decision": decision.reason, "accepted": decision.rebalance}
            if report is not None:
                seen |= {
                    "received": report.bytes_received,
                    "read": report.bytes_read,
                    "staging": report.staging_bytes,
                    "exchange": report.seconds,
                }
            pipe.send(seen)
    except BaseException:
        pipe.send({"error": traceback.format_exc()})


def server_arguments(model: str, ranks: int):
    """Return the arguments of a server whose EPLB may lose ranks, as SGLang settles them."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import prepare_server_args

    from moe_placement_plugin.engines.sglang import carrier
    from moe_placement_plugin.engines.sglang.eplb import warm_up
    from moe_placement_plugin.engines.sglang.state import settings_of

    experts = json.loads((Path(model) / "config.json").read_text())["num_experts"]
    words = (
        "--device cpu --attention-backend torch_native --dtype float32 --sampling-backend pytorch "
        "--grammar-backend none --log-level info --enable-eplb --expert-placement-strategy eplb "
        f"--max-total-tokens 512 --mem-fraction-static 0.2 --tp-size {ranks} --ep-size {ranks} "
        # Two replicas of each expert on average.
        f"--skip-tokenizer-init --ep-num-redundant-experts {experts}"
    )
    server_args = prepare_server_args(
        [
            "--model-path",
            model,
            *words.split(),
            "--expert-rebalance",
            json.dumps(ANY_GAIN_AND_PHASE),
        ]
    )
    if hasattr(server_args, "resolve_once"):
        server_args.resolve_once()
    server_args.check_server_args()
    settings = settings_of(server_args)
    elastic = replace(settings.rebalancing, elastic=True)  # what --elastic-ep-backend sets
    settings = replace(settings, rebalancing=elastic)
    carrier.attach(server_args, settings)
    warm_up(settings)  # else every rank compiles for itself, at once
    return server_args


class Ranks:
    """Hold the processes of all ranks, and kill some of them.

    Args:
        context: starts them.
        model: the checkpoint.
        ranks: how many.
    """

    def __init__(self, context: WarmContext, model: str, ranks: int):
        server_args = server_arguments(model, ranks)
        from sglang.srt.server_args import PortArgs

        port_args = PortArgs.init_new(server_args)
        self.processes, self.pipes = [], []
        self.alive = list(range(ranks))
        for rank in range(ranks):
            here, there = context.Pipe()
            process = context.Process(
                target=rank_process,
                args=(server_args, port_args, rank, ranks, model, there),
                daemon=True,
            )
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)

    def seen(self) -> dict[int, dict]:
        """Wait for what every rank that is alive says next."""
        return {rank: self.pipes[rank].recv() for rank in self.alive}

    def step(self, number: int, dead: tuple[int, ...]) -> dict[int, dict]:
        """Kill some ranks, and have the others rebalance."""
        for rank in dead:
            os.kill(self.processes[rank].pid, signal.SIGKILL)
            self.processes[rank].join()
            self.alive.remove(rank)
        for rank in self.alive:
            self.pipes[rank].send((number, dead))
        return self.seen()


def main() -> None:
    """Go through all steps; what was seen is written after each."""
    context = WarmContext(["sglang.srt.managers.scheduler", "sglang.benchmark.one_batch"])
    model, results = sys.argv[1:3]
    ranks = int(sys.argv[3]) if len(sys.argv) > 3 else RANKS
    steps = STEPS if ranks == RANKS else STEPS_OF_EIGHT
    here = Ranks(context, model, ranks)
    found = [{"name": "begin", "ranks": here.seen()}]
    for number, (name, dead) in enumerate(steps):
        if any("error" in r for r in found[-1]["ranks"].values()):
            break
        found.append({"name": name, "ranks": here.step(number, dead)})
        Path(results).write_text(json.dumps(found))
    Path(results).write_text(json.dumps(found))
    for process in here.processes:
        process.kill()


if __name__ == "__main__":
    main()
