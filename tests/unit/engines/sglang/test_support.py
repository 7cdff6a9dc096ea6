"""Test what is refused, and the table in the docs."""

from __future__ import annotations

import re

import pytest

from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.engines.sglang.combination import Combination
from moe_placement_plugin.engines.sglang.placement_rules import PLACEMENT_RULES
from moe_placement_plugin.engines.sglang.support import (
    EPLB_RULES,
    RIGHT,
    RULES,
    VERIFICATION_RULES,
    check,
    check_placement,
    refusals,
)

PLAIN = Combination(version="0.5.20", architecture="Qwen3MoeForCausalLM")


def with_(**changes) -> Combination:
    from dataclasses import replace

    return replace(PLAIN, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"has_location": False, "architecture": "MixtralForCausalLM"},
            "MixtralForCausalLM.*keeps no map of experts",
        ),
        (
            {"architecture": "BailingMoeV2ForCausalLM", "redundant": 2},
            "asserts that there are none",
        ),
        ({"architecture": "LLaDA2MoeModelLM", "redundant": 2}, "asserts that there are none"),
        ({"architecture": "SarvamMoEForCausalLM", "redundant": 2}, "asserts that there are none"),
        ({"architecture": "XllmForCausalLM"}, "own model refuses every placement"),
        ({"architecture": "K2HorizonForCausalLM"}, "own model refuses every placement"),
        ({"architecture": "LongcatFlashForCausalLM"}, "beyond the map"),
        ({"architecture": "TransformersMoEForCausalLM"}, "outside SGLang's TopK"),
        (
            {"quantization": "mxfp4", "architecture": "MiniMaxM3ForCausalLM"},
            "MXFP4.*bf16 checkpoint",
        ),
        (
            {"quantization": "quark", "architecture": "GptOssForCausalLM"},
            "gpt-oss quantized by Quark",
        ),
        ({"quantization": "modelopt_fp4"}, "NVFP4.*trivial map"),
        ({"quantization": "modelopt_mixed"}, "NVFP4.*trivial map"),
        ({"quantization": "nvfp4_online"}, "NVFP4.*trivial map"),
        ({"load_format": "sharded_state"}, "whatever placement.*--load-format auto"),
        ({"load_format": "presharded"}, "whatever placement.*--load-format auto"),
        ({"load_format": "remote_instance"}, "whatever placement.*--load-format auto"),
        ({"load_format": "gguf"}, "GGUF.*safetensors checkpoint"),
        ({"options": frozenset({"weight_cache_mode"})}, "--weight-cache-mode"),
        ({"options": frozenset({"use_ray"})}, "Ray .*without Ray"),
        ({"options": frozenset({"enable_nvidia_megakernel"})}, "--enable-nvidia-megakernel"),
        ({"options": frozenset({"enable_amd_monokernel"})}, "--enable-amd-monokernel"),
        (
            {"options": frozenset({"enforce_shared_experts_fusion"})},
            "--enforce-shared-experts-fusion",
        ),
        (
            {
                "options": frozenset(
                    {"remote_instance_weight_loader_start_seed_via_transfer_engine"}
                )
            },
            "by position",
        ),
        ({"quantization": "moe_wna16"}, "loaders of their own"),
        ({"quantization": "quark_int4fp8_moe"}, "loaders of their own"),
        ({"runner_backend": "flashinfer_trtllm"}, "routes by itself.*--moe-runner-backend triton"),
        ({"runner_backend": "triton_kernel"}, "routes by itself"),
        ({"a2a_backend": "ascend_fuseep"}, "--moe-a2a-backend"),
        ({"device": "npu"}, "devices other than CUDA"),
        ({"device": "cpu", "options": frozenset({"cpu_amx"})}, "AMX"),
        ({"dispatch": "static", "redundant": 4}, "counts several times"),
        ({"dispatch": "fake"}, "random numbers"),
        ({"options": frozenset({"elastic_ep_backend"})}, "--elastic-ep-backend.*add --enable-eplb"),
        (
            {"options": frozenset({"elastic_ep_backend", "enable_eplb", "max_ep_size"})},
            "ranks that join",
        ),
        (
            {"options": frozenset({"elastic_ep_backend", "enable_eplb"}), "quantization": "awq"},
            "packs its weights anew",
        ),
        ({"options": frozenset({"enable_lora"})}, "--enable-lora"),
        ({"options": frozenset({"lora_paths"})}, "--lora-paths"),
    ],
)
def test_refused_with_the_reason(changes, words):
    with pytest.raises(PlacementError) as caught:
        check_placement(with_(**changes))
    assert re.search(words, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"version": "0.5.16", "redundant": 4},
        {"architecture": "Glm4MoeForCausalLM", "redundant": 4},
        {"architecture": "BailingMoeV2ForCausalLM"},
        {"architecture": "GptOssForCausalLM", "quantization": "mxfp4"},
        {"architecture": "GptOssForCausalLM", "redundant": 2},
        {
            "a2a_backend": "deepep",
            "dispatch": "static",
            "redundant": 32,
            "architecture": "DeepseekV3ForCausalLM",
        },
        {"dispatch": "static"},
        {"quantization": "moe_wna16", "version": "0.5.23"},
        {"runner_backend": "triton"},
        {"device": "cpu"},
        {
            "options": frozenset({"elastic_ep_backend", "enable_eplb"}),
            "quantization": "fp8",
            "a2a_backend": "mooncake",
        },
    ],
)
def test_allowed(changes):
    check_placement(with_(**changes))


def test_every_rule_can_refuse_and_says_what_to_do_instead():
    combinations = [
        with_(has_location=False),
        with_(architecture="LLaDA2MoeModelLM", redundant=1),
        with_(architecture="LongcatFlashForCausalLM"),
        with_(architecture="XllmForCausalLM"),
        with_(architecture="DeepseekV4ForCausalLM"),
        with_(quantization="mxfp4"),
        with_(quantization="modelopt_fp4"),
        with_(quantization="humming"),
        with_(runner_backend="triton_kernel"),
        with_(a2a_backend="megamoe"),
        with_(device="xpu"),
        with_(device="cpu", options=frozenset({"cpu_amx"})),
        with_(dispatch="lp", redundant=1),
        with_(dispatch="fake"),
        with_(options=frozenset({"elastic_ep_backend"})),
        with_(
            options=frozenset(
                {
                    "elastic_ep_backend",
                    "enable_eplb",
                    "ep_join_mode",
                    "enable_elastic_expert_backup",
                }
            ),
            quantization="awq",
        ),
        with_(options=frozenset({"enable_waterfill"})),
        with_(load_format="sharded_state"),
        with_(load_format="gguf"),
        *(
            with_(options=frozenset({option}))
            for option in (
                "weight_cache_mode",
                "use_ray",
                "enable_amd_monokernel",
                "enforce_shared_experts_fusion",
                "remote_instance_weight_loader_start_seed_via_transfer_engine",
            )
        ),
    ]
    assert {rule for c in combinations for rule in refusals(c)} == set(PLACEMENT_RULES)
    assert all(rule.why and rule.mend for rule in RULES)
    assert all(right.known for right in RIGHT)


@pytest.mark.parametrize(
    ("rules", "changes", "words"),
    [
        (
            EPLB_RULES,
            {"tp_size": 4},
            "--tp-size 4 and --ep-size 2: .* wrong experts; make them equal",
        ),
        (EPLB_RULES, {"pp_size": 2}, "--pp-size 2: .*first pipeline stage"),
        (EPLB_RULES, {"load_format": "dummy"}, "--load-format dummy: most models list"),
        (EPLB_RULES, {"plans": True, "algorithm": "deepseek"}, "both decide how to rebalance"),
        (VERIFICATION_RULES, {"ep_size": 1}, "--ep-size 1: no rank holds whole experts"),
        (
            VERIFICATION_RULES,
            {"options": frozenset({"elastic_ep_backend"}), "places": False},
            "--elastic-ep-backend: ranks that come and go",
        ),
        (VERIFICATION_RULES, {"load_format": "dummy", "redundant": 2}, "2 redundant experts: repl"),
        (
            VERIFICATION_RULES,
            {"level": "checkpoint", "options": frozenset({"--enable-memory-saver"})},
            "--enable-memory-saver: it would keep",
        ),
    ],
)
def test_other_refusals_name_the_flag_and_the_mend(rules, changes, words):
    with pytest.raises(PlacementError, match=f"^--flag.*{words}"):
        check(rules, with_(**changes), "--flag")
    check(rules, PLAIN, "--flag")
