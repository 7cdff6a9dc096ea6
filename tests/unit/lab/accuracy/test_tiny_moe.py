"""Test the trained tiny MoE: its data, its size, what it can do and how it routes."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from make_tasks import questions
from problems import CLOSES, DOMAINS, Problem, examination, held_out, problems

from moe_placement_plugin.formats.load_file import read_load

from .accuracy import TASKS, TINY

MODELS = ("qwen3-moe", "glm4-moe")


def right_answer(domain: str, prompt: str) -> str:
    """Find the answer out in another way than `problems` does."""
    text = prompt[:-1]
    if domain == "sum":
        a, b = text.split("+")
        return "".join(reversed(f"{int(a) + int(b):03d}"))
    if domain == "brackets":
        # What is matched vanishes.
        while (shorter := re.sub(r"\(\)|\[\]|\{\}|<>", "", text)) != text:
            text = shorter
        return text[::-1].translate(str.maketrans(CLOSES))
    return {"sort": "".join(sorted(text)), "reverse": text[::-1], "copy": text}[domain]


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (TASKS / name).read_text().splitlines()]


def test_task_data_is_what_the_script_writes():
    written = {path.name: lines(path.name) for path in TASKS.glob("*.jsonl")}
    assert written == questions()
    assert {path.stem for path in TASKS.glob("*.yaml")} == {
        name.removesuffix(".jsonl") for name in written
    }


@pytest.mark.parametrize("domain", DOMAINS)
def test_questions_have_right_answers_and_are_not_trained_on(domain):
    asked = lines(f"{domain}.jsonl")
    assert len({line["prompt"] for line in asked}) == 200
    assert all(line["answer"] == right_answer(domain, line["prompt"]) for line in asked)
    trained = {
        problem.prompt for problem in itertools.islice(problems(domain, 0, training=True), 20_000)
    }
    assert not trained & {line["prompt"] for line in asked}
    # The rule that keeps them apart, whatever the seed.
    assert all(held_out(line["prompt"]) for line in asked) and not any(map(held_out, trained))
    assert not trained & {problem.prompt for problem in examination(domain, 200, 99)}


@pytest.mark.parametrize("domain", ["sum", "brackets"])
def test_choices_have_one_right_answer(domain):
    for line in lines(f"{domain}_choice.jsonl"):
        right = right_answer(domain, line["prompt"])
        assert [choice == right for choice in line["choices"]] == [
            i == line["label"] for i in range(4)
        ]
        assert {len(choice) for choice in line["choices"]} == {len(right)}


def test_task_files_load_in_lm_eval():
    pytest.importorskip("lm_eval", reason="the extra `accuracy` is not installed here")
    pytest.importorskip("datasets")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    names = {f"tiny_moe_{path.stem}" for path in TASKS.glob("*.yaml")}
    assert set(manager.all_subtasks) >= names
    tasks = manager.load(sorted(names))["tasks"]
    assert tasks.keys() == names
    for name, task in tasks.items():
        doc = lines(f"{name.removeprefix('tiny_moe_')}.jsonl")[0]
        assert task.doc_to_text(doc) == doc["prompt"]
        if name.endswith("_choice"):
            assert task.config.output_type == "multiple_choice"
            assert (
                task.doc_to_choice(doc) == doc["choices"]
                and task.doc_to_target(doc) == doc["label"]
            )
        else:
            assert (
                task.config.output_type == "generate_until"
                and task.doc_to_target(doc) == doc["answer"]
            )
            assert task.config.generation_kwargs["temperature"] == 0


@pytest.mark.parametrize("model", MODELS)
def test_checkpoint_is_small_and_its_load_fits(model):
    from safetensors import safe_open

    assert (TINY / model / "model.safetensors").stat().st_size <= 3_000_000
    config = json.loads((TINY / model / "config.json").read_text())
    assert (
        config.get("num_experts") or config["n_routed_experts"],
        config["num_experts_per_tok"],
    ) == (32, 4)
    with safe_open(TINY / model / "model.safetensors", "np") as tensors:
        layers = {
            int(name.split(".")[2]) for name in tensors.keys() if ".experts.31.up_proj" in name
        }
    load = read_load(TINY / "loads" / f"{model}.safetensors")
    assert (
        load.layer_ids == tuple(sorted(layers))
        and load.num_experts == 32
        and load.num_windows == len(DOMAINS)
    )


@pytest.mark.parametrize("model", MODELS)
def test_readme_states_what_was_measured(model):
    measured = json.loads((TINY / model / "measured.json").read_text())
    text = (TINY / "README.md").read_text()
    for domain in DOMAINS:
        score, skew = (measured[key][domain] for key in ("exact_match", "max_over_mean"))
        row = f"| {model} | {domain} | {score:.1%} | {skew:.1f} |"
        assert row in text, row
    assert f"| {model} | all | | {measured['max_over_mean']['all']:.1f} |" in text
    distance = measured["distance"]
    assert (
        f"{model}: {distance['least']:.2f} to {distance['greatest']:.2f}, mean "
        f"{distance['mean']:.2f}" in text
    )


@pytest.fixture(scope="module")
def loaded():
    """Return the model in float32 and its encoder, by model name."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("the training script needs transformers 5")
    from train import load

    return {model: load(TINY / model) for model in MODELS}


@pytest.mark.parametrize("model", MODELS)
def test_answers_and_routing_are_as_stated(loaded, model):
    import torch
    from train import exact_match, routing

    network, encode = loaded[model]
    measured = json.loads((TINY / model / "measured.json").read_text())
    shares = {}
    for domain in DOMAINS:
        sample = examination(domain, 100, 7)
        assert exact_match(network, encode, sample) >= 0.95, domain
        load = routing(network, encode, sample).double()
        shares[domain] = load / load.sum(1, keepdim=True)
        skew = (load.amax(1) / load.mean(1)).mean().item()
        assert skew == pytest.approx(measured["max_over_mean"][domain], rel=0.1) and skew > 2.5, (
            domain
        )
    for a, b in itertools.combinations(shares, 2):
        assert 0.5 * (shares[a] - shares[b]).abs().sum(1).mean() > 0.25, (a, b)
    together = torch.stack(list(shares.values())).mean(0)
    assert (together.amax(1) / together.mean(1)).mean() > 2


@pytest.fixture
def broken(loaded):
    """Put other experts' weights where some experts' belong, until the test ends."""
    kept = []

    def break_(model: str, layers: slice, experts: list[int], by: list[int]) -> None:
        for layer in loaded[model][0].model.layers[layers]:
            for weights in (layer.mlp.experts.gate_up_proj.data, layer.mlp.experts.down_proj.data):
                kept.append((weights, weights.clone()))
                weights[experts] = kept[-1][1][by]

    yield break_
    for weights, right in kept:
        weights.copy_(right)


@pytest.mark.parametrize("model", MODELS)
def test_a_map_without_its_weights_costs_answers(loaded, broken, model):
    """Experts are numbered as zigzag numbers them, weights lie where the checkpoint has them.

    There are two ranks.
    """
    from train import exact_match

    network, encode = loaded[model]
    broken(model, slice(-3, None), list(range(32)), [*range(0, 32, 2), *range(1, 32, 2)])
    assert max(exact_match(network, encode, examination(domain, 50, 8)) for domain in DOMAINS) < 0.9


@pytest.mark.parametrize("model", MODELS)
def test_two_exchanged_experts_move_log_probabilities(loaded, broken, model):
    """It is too little to cost many answers, but log probabilities of the choices move.

    They move by more than the tolerance (0.001).
    """
    import torch
    from train import routing

    network, encode = loaded[model]
    asked = [
        line for domain in ("sum", "brackets") for line in lines(f"{domain}_choice.jsonl")[:50]
    ]
    sample = [Problem(line["prompt"], choice) for line in asked for choice in line["choices"]]
    ids, targets, _ = encode(sample)

    @torch.no_grad()
    def logprobs():
        """Return log probabilities, ``[questions, choices]``."""
        every = network(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        return (
            every.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
            .masked_fill(targets < 0, 0)
            .sum(1)
            .view(-1, 4)
        )

    right = logprobs()
    assert torch.equal(logprobs(), right)
    busy = routing(network, encode, sample)[-2].topk(2).indices.tolist()
    broken(model, slice(-2, -1), busy, busy[::-1])
    assert ((logprobs() - right).abs().amax(1) > 0.001).float().mean() > 0.5
