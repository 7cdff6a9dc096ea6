"""The package's structure: imports point down, without circles, late ones for a reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.paths import ROOT

NAME = "moe_placement_plugin"
PACKAGE = ROOT / NAME

FLOORS = [
    ["_version", "core"],
    ["formats", "planner"],
    ["hosts"],
    ["strategies", "verification", "recording", "exchange"],
    ["simulation"],
    ["rebalancing"],
    ["report"],
    ["engines.common"],
    ["engines.vllm", "engines.sglang"],
    ["lab"],
    ["cli"],
]
"""Ground first. Folders of one floor do not import each other."""

FACE = {"", "__main__"}
"""The package's own face may import any floor, late."""

REASONS = ("heavy", "engine", "numba")


class Edge(NamedTuple):
    """One import of one of our modules by another."""

    importer: str
    imported: str
    late: bool
    line: int


def module_of(path: Path, root: Path) -> str:
    """The module's name within the package; "" for the package itself."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def edges_of(path: Path, root: Path, modules: set[str]) -> Iterator[Edge]:
    """All imports of the package in one file but those that only type checkers see."""
    module = module_of(path, root)
    folder = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    unseen: set[ast.AST] = set()
    late: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            unseen.update(part for line in node.body for part in ast.walk(line))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            late.update(part for line in node.body for part in ast.walk(line))
    for node in ast.walk(tree):
        if node in unseen:
            continue
        if isinstance(node, ast.ImportFrom):
            if node.level:
                parts = folder.split(".") if folder else []
                parts = parts[: len(parts) - node.level + 1]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            elif (node.module or "").split(".")[0] == NAME:
                base = node.module[len(NAME) + 1 :]
            else:
                continue
            names = [f"{base}.{alias.name}".lstrip(".") for alias in node.names]
            found = {name if name in modules else base for name in names}
        elif isinstance(node, ast.Import):
            found = {a.name[len(NAME) + 1 :] for a in node.names if a.name.split(".")[0] == NAME}
        else:
            continue
        for imported in found - {module}:
            yield Edge(module, imported, node in late, node.lineno)


def all_edges(root: Path) -> list[Edge]:
    """Every import within a package."""
    paths = sorted(root.rglob("*.py"))
    modules = {module_of(path, root) for path in paths}
    return [edge for path in paths for edge in edges_of(path, root, modules)]


def floor_of(module: str) -> tuple[int, str]:
    """(floor, folder) of a module.

    Raises:
        LookupError: when no floor has it.
    """
    for number, folders in enumerate(FLOORS):
        for folder in folders:
            if module == folder or module.startswith(folder + "."):
                return number, folder
    raise LookupError(f"{module} is on no floor: add its folder to FLOORS")


def circles(edges: list[Edge]) -> list[list[str]]:
    """Modules that import each other in a circle, late imports included (Tarjan's components)."""
    graph: dict[str, set[str]] = {}
    for edge in edges:
        graph.setdefault(edge.importer, set()).add(edge.imported)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(graph.get(module, ())):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            at = stack.index(module)
            part = stack[at:]
            del stack[at:]
            if len(part) > 1:
                found.append(sorted(part))

    for module in sorted(graph):
        if module not in index:
            visit(module)
    return found


def upward(edges: list[Edge]) -> list[Edge]:
    """Imports of a higher floor, or of another folder of the same one."""
    wrong = []
    for edge in edges:
        if edge.importer in FACE or edge.imported == "" and edge.importer.split(".")[0] == "lab":
            continue
        (low, mine), (high, other) = floor_of(edge.importer), floor_of(edge.imported)
        if high > low or (high == low and mine != other):
            wrong.append(edge)
    return wrong


def without_reason(edges: list[Edge], root: Path) -> list[str]:
    """Late imports whose line does not say why."""
    lacking = []
    for edge in edges:
        path = root / (edge.importer.replace(".", "/") + ".py")
        path = path if path.exists() else root / edge.importer.replace(".", "/") / "__init__.py"
        lines = path.read_text().splitlines()
        # A comment of an import in brackets stands behind the opening one.
        if edge.late and not any(f"# lazy: {r}" in lines[edge.line - 1] for r in REASONS):
            lacking.append(f"{path.relative_to(root.parent)}:{edge.line}")
    return sorted(set(lacking))


@pytest.fixture(scope="module")
def edges() -> list[Edge]:
    return all_edges(PACKAGE)


def test_no_circles(edges):
    assert circles(edges) == []


def test_imports_point_down(edges):
    assert upward(edges) == []


def test_each_late_import_says_why(edges):
    assert without_reason(edges, PACKAGE) == []


def test_planted_faults_are_found(tmp_path):
    root = tmp_path / NAME
    files = {
        "core/a.py": "from ..lab import run\n",
        "core/b.py": "from . import c\n",
        "core/c.py": "def f():\n    from .b import x\n",
        "lab/run.py": "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from ..cli import x\n",
        "cli/__init__.py": "x = 1\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    found = all_edges(root)
    assert circles(found) == [["core.b", "core.c"]]
    assert [edge[:2] for edge in upward(found)] == [("core.a", "lab.run")]
    assert without_reason(found, root) == [f"{NAME}/core/c.py:2"]
