"""The architecture page is true: its files exist, its floors hold, its walks can be walked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from moe_placement_plugin.strategies import registry
from tests.support.paths import DOCS, ROOT
from tests.unit.test_imports import FLOORS, PACKAGE, all_edges

PAGE = (DOCS / "architecture.md").read_text(encoding="utf-8")
ENGINES = ("vllm", "sglang")

CALLERS = {
    "vLLM": "engines/vllm/",
    "SGLang": "engines/sglang/",
    "engine": "engines/*/",
    "user": "cli/",
}
"""Who calls a file of ours from outside, as a line of a walk names it -> where that file lies."""

STEP = re.compile(r"( *)(?:\[(\w+)\] .*|([\w/*]+\.py)(?:  +.*)?)$")


class Step(NamedTuple):
    """One line of a walk."""

    depth: int
    caller: str | None
    file: str | None


def section(title: str) -> str:
    """Return the part of the page under a heading of the second level."""
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(text: str) -> list[str]:
    """Return what stands in fences."""
    return re.findall(r"```\n(.*?)```", text, re.S)


def expand(file: str) -> list[str]:
    """Name the file of each engine where ``*`` stands for both."""
    return [file.replace("*", engine) for engine in ENGINES] if "*" in file else [file]


def timeline() -> dict[str, list[str]]:
    """Map each engine to the files of its adapter that the timeline names, in their order."""
    head, *lines = blocks(section("Two processes"))[0].splitlines()
    second = head.index("SGLang")
    return {
        "vllm": [file for line in lines for file in re.findall(r"\w+\.py", line[:second])],
        "sglang": [file for line in lines for file in re.findall(r"\w+\.py", line[second:])],
    }


def module_of(file: str) -> str:
    """Name the module of a file of the package."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def steps_of(walk: str) -> list[Step]:
    """Read a walk line by line.

    Raises:
        AssertionError: for a line that is neither a file nor a call from outside.
    """
    steps = []
    for line in walk.splitlines():
        match = STEP.match(line)
        assert match, f"neither a file nor a caller: {line}"
        steps.append(Step(len(match[1]) // 2, match[2], match[3]))
    return steps


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """Map each module to those that it imports, by itself, through a folder's face, or by name."""
    direct: dict[str, set[str]] = {}
    for edge in all_edges(PACKAGE):
        direct.setdefault(edge.importer, set()).add(edge.imported)
    direct["strategies.registry"] |= {
        f"strategies.{place.partition(':')[0]}" for place in registry._BUILT_IN.values()
    }
    faces = {module_of(str(path.relative_to(PACKAGE))) for path in PACKAGE.rglob("__init__.py")}
    return {
        module: others | {far for face in others & faces for far in direct.get(face, ())}
        for module, others in direct.items()
    }


def gaps(walk: str, imports: dict[str, set[str]]) -> Iterator[str]:
    """Find steps that nothing leads to: neither an import of the file above nor a caller."""
    steps = steps_of(walk)
    for number, step in enumerate(steps):
        if step.file is None or number == 0:
            continue
        parent = next((s for s in reversed(steps[:number]) if s.depth < step.depth), None)
        before = steps[number - 1]
        if parent is not None and parent.file is not None:
            yield from _unconnected(parent.file, step.file, imports)
        elif parent is not None or before.caller is None:
            yield f"nothing leads to {step.file}"
        elif not step.file.startswith((CALLERS[before.caller], *expand(CALLERS[before.caller]))):
            yield f"{step.file} is not called from there"


def _unconnected(parent: str, child: str, imports: dict[str, set[str]]) -> Iterator[str]:
    both = "*" in parent and "*" in child
    pairs = (
        zip(expand(parent), expand(child))
        if both
        else ((above, below) for above in expand(parent) for below in expand(child))
    )
    for above, below in pairs:
        if module_of(below) not in imports.get(module_of(above), ()):
            yield f"{above} does not import {below}"


WALKS = blocks(section("Four walks"))


def test_the_page_fits_on_one():
    lines = PAGE.splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 100


def test_every_file_exists():
    named = {file for name in re.findall(r"[\w*/]+/[\w*]+\.py", PAGE) for file in expand(name)}
    named |= {f"engines/{engine}/{file}" for engine in ENGINES for file in timeline()[engine]}
    missing = {f for f in named if not (PACKAGE / f).exists() and not (ROOT / f).exists()}
    assert not missing and len(named) > 60


def test_the_floors_are_those_of_the_import_test():
    picture = blocks(section("Floors"))[0]
    shown = [
        re.findall(r"[\w/]+", line.rpartition("│")[0])
        for line in picture.splitlines()
        if line.startswith("│")
    ]
    assert [[name.replace("/", ".") for name in floor] for floor in shown[::-1]] == FLOORS


def test_both_engines_have_every_role_on_the_page():
    roles = "flags resolve support patches hosts expert_maps loading evidence verification".split()
    roles += "recording eplb eplb_phases eplb_exchange".split()
    for engine in ENGINES:
        assert {f"{role}.py" for role in roles} <= set(timeline()[engine])


@pytest.mark.parametrize("walk", WALKS, ids=lambda walk: steps_of(walk)[-1].file)
def test_every_step_of_a_walk_leads_to_the_next(walk, imports):
    assert list(gaps(walk, imports)) == []


def test_all_walks_are_there():
    assert len(WALKS) == 5, "the first one for each engine"


@pytest.mark.parametrize(
    "walk, fault",
    [
        ("core/load.py\n  core/placement.py\n", "core/load.py does not import core/placement.py"),
        ("cli/plan.py\ncli/inputs.py\n", "nothing leads to cli/inputs.py"),
        ("[vLLM] starts\nengines/sglang/flags.py\n", "is not called from there"),
        ("core/diff.py\n  core/placement.py\n    core/topology.py\n", "import core/topology.py"),
        ("engines/*/flags.py\n  engines/vllm/detect.py\n", "engines/sglang/flags.py does not"),
    ],
)
def test_a_planted_gap_is_found(walk, fault, imports):
    (found,) = gaps(walk, imports)
    assert fault in found
