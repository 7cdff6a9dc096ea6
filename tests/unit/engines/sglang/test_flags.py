"""Follow the flags to the resolved placement, and check every refusal.

They come from the command line, YAML and `sglang.Engine`.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest

from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.engines.sglang import resolve as plan
from moe_placement_plugin.engines.sglang.slots import fill_up
from moe_placement_plugin.engines.sglang.state import SENTINEL, STATE, settings_of
from moe_placement_plugin.formats.plan_json import read_plan
from moe_placement_plugin.formats.plan_or_load import write
from moe_placement_plugin.formats.sglang import to_sglang
from moe_placement_plugin.strategies.registry import get_strategy


@pytest.fixture(scope="module", autouse=True)
def plugins():
    from sglang.srt.plugins import load_plugins

    STATE.settings = None
    load_plugins()
    yield
    STATE.settings = None


def arguments(model, *more: str) -> list[str]:
    common = (
        "--device cpu --attention-backend torch_native --dtype float32 --sampling-backend pytorch "
        "--grammar-backend none"
    )
    return ["--model-path", str(model), *common.split(), *more]


def resolve(argv: list[str]):
    """Do what a server does with its command line before it starts any process."""
    from sglang.srt.server_args import prepare_server_args

    server_args = prepare_server_args(argv)
    if hasattr(server_args, "resolve_once"):
        server_args.resolve_once()
    server_args.check_server_args()
    return server_args


def refused(argv: list[str]) -> str:
    with pytest.raises(PlacementError) as caught:
        resolve(argv)
    return str(caught.value)


TWO = ("--tp-size", "2", "--ep-size", "2")


@pytest.mark.parametrize("strategy", ["linear", "balanced", "zigzag", "round_robin"])
def test_a_strategy_becomes_the_engines_placement(models, strategy):
    server_args = resolve(
        arguments(models["qwen32"], *TWO, "--expert-placement-strategy", strategy)
    )
    asked = settings_of(server_args)
    assert server_args.init_expert_location == SENTINEL
    assert asked.plan.layer_ids == (0, 1, 2, 3)
    assert asked.plan.slots_per_rank == (16, 16)
    zigzag = [*range(0, 32, 2), *range(1, 32, 2)]
    expected = zigzag if strategy in ("zigzag", "round_robin") else list(range(32))
    assert asked.plan.physical_to_logical.tolist() == [expected] * 4


def test_without_the_flags_the_arguments_are_stock(models):
    server_args = resolve(arguments(models["qwen32"], *TWO))
    assert settings_of(server_args) is None
    assert server_args.init_expert_location == "trivial"


def test_the_settings_survive_pickling_and_announce_themselves(models):
    server_args = resolve(
        arguments(models["qwen32"], *TWO, "--expert-placement-strategy", "zigzag")
    )
    packed = pickle.dumps(server_args)
    STATE.settings = None
    copy = pickle.loads(packed)
    assert settings_of(copy).plan == settings_of(server_args).plan
    assert STATE.settings is settings_of(copy)


def test_yaml_config(models, tmp_path):
    config = tmp_path / "server.yaml"
    config.write_text("tp-size: 2\nep-size: 2\nexpert-placement-strategy: zigzag\n")
    server_args = resolve(arguments(models["qwen32"], "--config", str(config)))
    assert settings_of(server_args).plan.strategy == "zigzag"


def test_engine_arguments(models):
    from sglang import Engine

    server_args = Engine.server_args_class(
        model_path=str(models["qwen32"]),
        device="cpu",
        tp_size=2,
        ep_size=2,
        expert_placement_strategy="zigzag",
    )
    assert settings_of(server_args).strategy == "zigzag"
    assert server_args.init_expert_location == SENTINEL
    plain = Engine.server_args_class(model_path=str(models["qwen32"]), device="cpu")
    assert settings_of(plain) is None and plain.init_expert_location == "trivial"


@pytest.mark.parametrize("name", ["permutation", "permutation-sglang"])
def test_a_plan_file_decides_alone(models, files, name):
    server_args = resolve(
        arguments(models["qwen32"], *TWO, "--expert-placement-file", str(files[name]))
    )
    rows = settings_of(server_args).plan.physical_to_logical
    assert len({tuple(row) for row in rows.tolist()}) == 4


@pytest.mark.parametrize("name", ["load", "load-pt", "load-safetensors"])
def test_a_recorded_load_is_planned_with_the_engines_redundant_experts(models, files, name):
    flags = (
        "--expert-placement-strategy",
        "eplb",
        "--expert-placement-file",
        str(files[name]),
        "--ep-num-redundant-experts",
        "4",
    )
    asked = settings_of(resolve(arguments(models["qwen32"], *TWO, *flags)))
    assert asked.plan.num_slots == 36 and asked.plan.slots_per_rank == (18, 18)
    assert asked.plan.replica_counts.max() == 2


@pytest.mark.parametrize(
    ("experts", "ranks", "wanted", "padding"),
    [(30, 8, 0, 2), (30, 4, 0, 2), (30, 2, 0, 0), (30, 4, 2, 0), (30, 8, 3, 7), (32, 8, 0, 0)],
)
def test_uneven_counts_are_padded_with_replicas(
    models, monkeypatch, experts, ranks, wanted, padding
):
    flags = (
        "--tp-size",
        str(ranks),
        "--ep-size",
        str(ranks),
        "--ep-num-redundant-experts",
        str(wanted),
    )
    said: list[str] = []
    monkeypatch.setattr(plan.logger, "warning", lambda text, *values: said.append(text % values))
    server_args = resolve(
        arguments(models[f"qwen{experts}"], *flags, "--expert-placement-strategy", "balanced")
    )
    asked = settings_of(server_args)
    from moe_placement_plugin.engines.sglang.compat import resolved

    assert asked.placement.padding == padding
    assert resolved(server_args).ep_num_redundant_experts == wanted + padding
    assert asked.plan.is_even and asked.plan.num_redundant == wanted + padding
    assert len(said) == bool(padding)
    assert all(f"{padding} redundant slots per layer are added" in line for line in said)


def test_together_with_the_recording_of_the_load(models, tmp_path):
    flags = (
        "--expert-placement-strategy",
        "zigzag",
        "--expert-load-record",
        str(tmp_path / "load.safetensors"),
    )
    assert settings_of(resolve(arguments(models["qwen32"], *TWO, *flags))).plan.strategy == "zigzag"


def test_moe_layers_only_are_placed(models):
    asked = settings_of(
        resolve(arguments(models["glm"], *TWO, "--expert-placement-strategy", "zigzag"))
    )
    assert asked.plan.layer_ids == (1, 2, 3)
    assert len(to_sglang(asked.plan, 4)["physical_to_logical_map"]) == 4


def test_ep_smaller_than_tp(models):
    flags = ("--tp-size", "4", "--ep-size", "2", "--expert-placement-strategy", "zigzag")
    assert settings_of(resolve(arguments(models["qwen32"], *flags))).plan.num_ranks == 2


def test_an_uneven_plan_of_vllm_keeps_its_experts_and_is_filled_up(models, files):
    flags = (
        "--tp-size",
        "4",
        "--ep-size",
        "4",
        "--expert-placement-file",
        str(files["uneven-four-ranks"]),
    )
    placement = settings_of(resolve(arguments(models["qwen30"], *flags))).plan

    given = read_plan(files["uneven-four-ranks"])
    assert placement.slots_per_rank == (8, 8, 8, 8)
    for row in range(4):
        for rank in range(4):
            assert (
                placement.local_experts(row, rank)[: given.slots_per_rank[rank]].tolist()
                == given.local_experts(row, rank).tolist()
            )


def test_redundancy_decides_the_dispatch(models):
    from moe_placement_plugin.engines.sglang.compat import resolved

    flags = (*TWO, "--expert-placement-strategy", "zigzag")
    assert resolved(resolve(arguments(models["qwen32"], *flags))).ep_dispatch_algorithm == "static"
    redundant = resolve(arguments(models["qwen32"], *flags, "--ep-num-redundant-experts", "2"))
    assert resolved(redundant).ep_dispatch_algorithm == "dynamic"


def test_fill_up_takes_experts_that_the_rank_lacks():
    from moe_placement_plugin.core.placement import Placement

    filled = fill_up(Placement([[0, 1, 2, 3, 4]], 5, (3, 2)), 3)
    assert filled.physical_to_logical.tolist() == [[0, 1, 2, 3, 4, 0]]


# Bad input: the message names the value, the rule and the mend.


def test_unknown_strategy_on_the_command_line(models, capsys):
    from sglang.srt.server_args import prepare_server_args

    with pytest.raises(SystemExit):
        prepare_server_args(
            arguments(models["qwen32"], *TWO, "--expert-placement-strategy", "spiral")
        )
    message = capsys.readouterr().err
    assert "spiral" in message and "zigzag" in message and "eplb" in message


def test_unknown_strategy_in_python(models):
    from sglang import Engine

    with pytest.raises(
        PlacementError,
        match="unknown expert placement strategy 'spiral': choose one of linear, balanced, "
        "zigzag, eplb",
    ):
        Engine.server_args_class(
            model_path=str(models["qwen32"]), expert_placement_strategy="spiral"
        )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("not-json", "is not JSON"),
        ("neither", "neither a plan"),
        ("missing-expert", "layer 2 (has no slot for expert|holds expert)"),
        ("other-layers", "plan for 3 layers, the model has 4 MoE layers"),
        ("other-experts", "plan for 30 experts, the model has 32"),
        ("four-ranks", "plan for 4 EP ranks, the engine runs 2"),
        ("redundant", "4 redundant experts per layer, the server has --ep-num-redundant-experts 0"),
        ("load-negative", "must be finite and not negative"),
        ("load-nan", "must be finite and not negative"),
        ("load-other-experts", "30 experts per layer, the model has 32"),
    ],
)
def test_bad_files(models, files, name, words):
    message = refused(
        arguments(models["qwen32"], *TWO, "--expert-placement-file", str(files[name]))
    )
    import re

    assert re.search(words, message), message
    assert str(files[name]) in message


def test_missing_file(models, tmp_path):
    message = refused(
        arguments(models["qwen32"], *TWO, "--expert-placement-file", str(tmp_path / "none.json"))
    )
    assert "none.json" in message


def test_plan_with_redundant_experts_fits_when_asked_for(models, files):
    flags = ("--expert-placement-file", str(files["redundant"]), "--ep-num-redundant-experts", "4")
    assert settings_of(resolve(arguments(models["qwen32"], *TWO, *flags))).plan.num_slots == 36


def test_eplb_without_a_load(models):
    message = refused(arguments(models["qwen32"], *TWO, "--expert-placement-strategy", "eplb"))
    assert "has none" in message and "--expert-placement-file" in message


def test_one_expert_parallel_rank(models):
    message = refused(
        arguments(models["qwen32"], "--tp-size", "2", "--expert-placement-strategy", "zigzag")
    )
    assert "--ep-size 1" in message and "add --ep-size" in message


def test_together_with_init_expert_location(models, files):
    flags = (
        "--expert-placement-strategy",
        "zigzag",
        "--init-expert-location",
        str(files["permutation-sglang"]),
    )
    message = refused(arguments(models["qwen32"], *TWO, *flags))
    assert "--init-expert-location" in message and "leave one out" in message


def test_dispatch_that_differs_by_rank_with_redundant_experts(models):
    flags = (
        "--expert-placement-strategy",
        "zigzag",
        "--ep-num-redundant-experts",
        "4",
        "--ep-dispatch-algorithm",
        "static",
    )
    with pytest.raises(ValueError, match="static"):  # from 0.5.17 SGLang itself refuses it
        resolve(arguments(models["qwen32"], *TWO, *flags))


def test_elastic_expert_parallelism(models):
    flags = (
        "--expert-placement-strategy",
        "zigzag",
        "--elastic-ep-backend",
        "mooncake",
        "--moe-a2a-backend",
        "mooncake",
    )
    message = refused(arguments(models["qwen32"], *TWO, *flags))
    assert (
        "`--elastic-ep-backend` without `--enable-eplb`" in message
        and "leave --elastic-ep-backend out" in message
    )


def test_a_model_that_sglang_keeps_no_map_for(models, tmp_path):
    import json
    import shutil

    folder = tmp_path / "olmoe"
    shutil.copytree(models["qwen32"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe"})
    )
    message = refused(arguments(folder, *TWO, "--expert-placement-strategy", "zigzag"))
    assert "OlmoeForCausalLM" in message and "keeps no map of experts" in message


def test_a_dense_model(models, tmp_path):
    import json
    import shutil

    folder = tmp_path / "dense"
    shutil.copytree(models["qwen32"], folder)
    config = json.loads((folder / "config.json").read_text())
    for key in (
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "decoder_sparse_step",
        "mlp_only_layers",
    ):
        config.pop(key)
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"})
    )
    message = refused(arguments(folder, *TWO, "--expert-placement-strategy", "zigzag"))
    assert "no Mixture-of-Experts model" in message


@pytest.mark.parametrize("version", ["0.5.15", "0.5.24", "0.6.0", "unknown"])
def test_versions_outside_the_range(models, monkeypatch, version):
    import sglang

    monkeypatch.setattr(sglang, "__version__", version)
    message = refused(arguments(models["qwen32"], *TWO, "--expert-placement-strategy", "zigzag"))
    assert f"SGLang {version}" in message and "0.5.16 to 0.5.23" in message
    resolve(arguments(models["qwen32"], *TWO))  # without a flag any version is left alone


def test_a_changed_contract_is_named(models, monkeypatch):
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    def weight_loader(self, param, tensor, name, shard, expert):
        """Load as a future version might."""

    monkeypatch.setattr(FusedMoE, "weight_loader", weight_loader)
    message = refused(arguments(models["qwen32"], *TWO, "--expert-placement-strategy", "zigzag"))
    assert (
        "loader" in message
        and "expected also loaded_weight, weight_name, shard_id, expert_id" in message
    )


def test_hosts_with_and_without_the_heads_file(models, files, tmp_path):
    """Compare what each host makes of the same flags.

    They are --nnodes 2, with the file on the head only, or not what it should be.
    """
    two = (*TWO, "--nnodes", "2", "--dist-init-addr", "10.0.0.1:5000", "--node-rank")
    absent = str(tmp_path / "absent.json")
    eplb = ("--expert-placement-strategy", "eplb", "--expert-placement-file")

    def asked(*more: str):
        return settings_of(resolve(arguments(models["glm"], *more)))

    head = asked(
        *two,
        "0",
        *eplb,
        str(files["load-three"]),
        "--expert-placement-locality",
        "soft",
        "--expert-host-timeout",
        "20",
    )
    assert (
        head.plan.metadata["node_of_rank"] == [0, 1]
        and head.hosts.timeout == 20
        and not head.adopts
    )
    for second in (
        asked(*two, "1", *eplb, absent),
        asked(*two, "1", "--expert-placement-strategy", "eplb"),
    ):
        assert second.adopts and second.plan is None and second.hosts.error is None
    # An error that may be this host's only is told to the others by the workers; on one host it is
    # raised at once.
    other = asked(*two, "1", "--expert-placement-file", str(files["other-experts"]))
    assert "is a plan for 30 experts" in other.hosts.error and other.plan is None
    assert absent in asked(*two, "0", "--expert-placement-file", absent).hosts.error
    assert absent in refused(arguments(models["glm"], *TWO, "--expert-placement-file", absent))
    assert asked(*two, "1", "--expert-placement-strategy", "zigzag").hosts.nodes == 2
    zigzag = (*TWO, "--expert-placement-strategy", "zigzag")
    assert "there is no other host" in refused(
        arguments(models["glm"], *zigzag, "--expert-host-timeout", "20")
    )
    assert "on one node" in refused(
        arguments(
            models["glm"],
            *TWO,
            *eplb,
            str(files["load-three"]),
            "--expert-placement-locality",
            "node",
        )
    )
    assert "without an expert placement" in refused(
        arguments(models["glm"], *TWO, "--expert-host-timeout", "20")
    )


def test_every_strategy_is_offered():
    for name in ("linear", "balanced", "zigzag", "eplb"):
        assert get_strategy(name).name == name


# What loading the plugin does to SGLang.

_SNAPSHOT = """
import sys, types, importlib
MODULES = ["sglang.srt.server_args", "sglang.srt.entrypoints.engine", \
"sglang.srt.eplb.expert_location",
           "sglang.srt.eplb.expert_location_dispatch", "sglang.srt.layers.moe.topk", \
"sglang.srt.layers.moe.fused_moe_native",
           "sglang.srt.layers.moe.fused_moe_triton.layer", "sglang.srt.model_executor.model_runner",
           "sglang.srt.eplb.eplb_manager", "sglang.srt.eplb.eplb_algorithms", \
"sglang.srt.managers.scheduler"]
for name in MODULES:
    importlib.import_module(name)

def snapshot():
    seen = {}
    for name, module in list(sys.modules.items()):
        if not name.startswith("sglang") or not isinstance(module, types.ModuleType) \
or name.startswith("sglang.srt.plugins"):
            continue
        for attribute, value in list(vars(module).items()):
            if attribute.startswith("__"):
                continue
            seen[f"{name}:{attribute}"] = id(value)
            if isinstance(value, type) and value.__module__ == name:
                for member, inner in vars(value).items():
                    if not member.startswith("__") or member == "__init__":
                        seen[f"{name}:{attribute}.{member}"] = id(inner)
    return seen

from sglang.srt.plugins import load_plugins
before = snapshot()
keep = [vars(m).copy() for n, m in list(sys.modules.items()) if n.startswith("sglang")] \
 # no id may be reused
load_plugins()
after = snapshot()
for key in sorted(before):
    if after.get(key) != before[key]:
        print("CHANGED", key)
"""


def changed(env: dict[str, str] | None = None) -> set[str]:
    import os

    code = textwrap.dedent(_SNAPSHOT)
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, **(env or {})},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return {line.split()[1] for line in run.stdout.splitlines() if line.startswith("CHANGED")}


def test_without_a_flag_only_the_places_that_accept_it_differ():
    assert changed() == {
        "sglang.srt.server_args:ServerArgs.add_cli_args",
        "sglang.srt.server_args:ServerArgs.from_cli_args",
        "sglang.srt.entrypoints.engine:Engine.server_args_class",
    }


def test_sglang_plugins_that_leave_us_out_leave_sglang_untouched():
    assert changed({"SGLANG_PLUGINS": "another"}) == set()


def test_sglang_plugins_that_leave_us_out_leave_the_flag_unknown(models):
    import os

    code = f"""
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args
load_plugins()
prepare_server_args({arguments(models["qwen32"], *TWO, "--expert-placement-strategy", "zigzag")!r})
"""
    env = {**os.environ, "SGLANG_PLUGINS": "another"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=180,
        env=env,
        check=False,
    )
    assert run.returncode == 2
    assert "unrecognized arguments: --expert-placement-strategy zigzag" in run.stderr


def test_a_quantization_that_only_modelopts_file_names_is_known(models, tmp_path):
    """Notice the fault: reading ``config.json`` alone, which says nothing of it."""
    import json
    import shutil

    model = shutil.copytree(models["qwen32"], tmp_path / "nvfp4")
    (model / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None}})
    )
    message = refused(arguments(model, *TWO, "--expert-placement-strategy", "zigzag"))
    assert "NVFP4 (modelopt_fp4" in message


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--load-format", "sharded_state"), "whatever placement that server had"),
        (("--enforce-shared-experts-fusion",), "--enforce-shared-experts-fusion"),
    ],
)
def test_what_would_go_round_the_map_is_refused_before_loading(models, more, message):
    assert message in refused(
        arguments(models["qwen32"], *TWO, "--expert-placement-strategy", "zigzag", *more)
    )


def test_ray_is_refused_where_its_engine_was_imported(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "sglang.srt.ray.engine", object())
    message = refused(arguments(models["qwen32"], *TWO, "--expert-placement-strategy", "zigzag"))
    assert "Ray (" in message and "start the server without Ray" in message


def with_draft(files, tmp_path, experts=32, slots=(16, 16), layer_ids=(4,)) -> str:
    """Write a plan for qwen32 with rows for a draft, and return its path."""
    from moe_placement_plugin.core.placement import Placement

    found = read_plan(files["permutation"])
    repeated = [e % experts for e in range(sum(slots))]
    draft = Placement([repeated] * len(layer_ids), experts, slots, layer_ids, "draft")
    plan_with = Placement(
        found.physical_to_logical, 32, found.slots_per_rank, found.layer_ids, "custom", {}, draft
    )
    write(plan_with, tmp_path / "plan.json")
    return str(tmp_path / "plan.json")


def speculation(draft) -> tuple[str, ...]:
    chain = "--speculative-num-steps 2 --speculative-eagle-topk 1 --speculative-num-draft-tokens 3"
    path = ("--speculative-draft-model-path", str(draft))
    return ("--speculative-algorithm", "EAGLE", *path, *chain.split())


def test_rows_for_a_draft_go_to_the_workers(models, files, tmp_path):
    """Send rows of the target's checkpoint, or of another one; ranks may be unequal."""
    for draft, experts, slots in (("qwen32", 32, (16, 16)), ("qwen30", 30, (20, 10))):
        file = with_draft(files, tmp_path, experts, slots)
        server_args = resolve(
            arguments(
                models["qwen32"], *TWO, *speculation(models[draft]), "--expert-placement-file", file
            )
        )
        STATE.settings = None
        rows = settings_of(pickle.loads(pickle.dumps(server_args))).plan.draft
        assert rows.layer_ids == (4,) and rows.slots_per_rank == slots


@pytest.mark.parametrize(
    ("draft", "more", "rows", "message"),
    [
        (None, (), {}, r"rows for a draft \(layers \[4\]\), and this engine runs no draft"),
        ("qwen30", (), {}, "for a draft with 32 experts, the draft .*qwen30 has 30: plan for"),
        ("qwen32", (), {"slots": (8,) * 4}, "for a draft on 4 EP ranks .* runs 2 and 0"),
        ("qwen32", (), {"slots": (17, 17)}, "on 2 EP ranks with 2 redundant experts"),
        ("qwen32", ("--enable-eplb",), {}, r"\(layers \[4\]\), which stays in SGLang's own order"),
        ("qwen32", ("--moe-a2a-backend", "deepep"), {"slots": (20, 12)}, "deepep needs the same"),
        ("dense", (), {}, "this engine runs no draft with experts"),
    ],
)
def test_rows_that_fit_no_draft_of_the_server_are_refused(
    models, files, tmp_path, monkeypatch, draft, more, rows, message
):
    import re

    from moe_placement_plugin.engines.sglang import drafts

    if "--moe-a2a-backend" in more:  # nothing of a CPU's
        more, check = (), drafts.check_rows

        def with_a2a(found, asked, cfg, target):
            values = {"model_path": cfg.model_path, "moe_a2a_backend": "deepep"}
            names = ("speculative_algorithm", "speculative_draft_model_path", "trust_remote_code")
            check(
                found,
                asked,
                SimpleNamespace(**values, **{n: getattr(cfg, n) for n in names}),
                target,
            )

        monkeypatch.setattr(drafts, "check_rows", with_a2a)
    path = models.get(draft)
    if draft == "dense":
        path = tmp_path / "dense"
        path.mkdir()
        config = json.loads((models["qwen32"] / "config.json").read_text())
        config |= {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "num_experts": 0,
        }
        (path / "config.json").write_text(json.dumps(config))
    file = with_draft(files, tmp_path, **rows)
    spec = speculation(path) if draft else ()
    found = refused(
        arguments(models["qwen32"], *TWO, *spec, *more, "--expert-placement-file", file)
    )
    assert re.search(message, found), found
    assert str(tmp_path / "plan.json") in found and "\n" not in found


def test_a_recording_without_a_token_is_refused(models, tmp_path):
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({"logical_count": [[0] * 32] * 4}))
    message = refused(
        arguments(
            models["qwen32"],
            *TWO,
            "--expert-placement-strategy",
            "eplb",
            "--expert-placement-file",
            str(empty),
        )
    )
    assert "empty.json" in message
