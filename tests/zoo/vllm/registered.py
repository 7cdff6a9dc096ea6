"""Find the MoE classes of vLLM's registry in its sources, without importing a model."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

FACTORIES = frozenset({"FusedMoEFactory", "RoutedExperts", "FusedMoE", "fused_experts"})
"""What a model calls or inherits to have routed experts."""

_OTHER_HARDWARE = frozenset({"amd", "xpu", "tpu"})


def moe_architectures() -> dict[str, tuple[str, str]]:
    """Return (module, class) of every registered class that reaches routed experts, by name.

    A class reaches them if its body, its bases, or a class or function that these name, calls one
    of `FACTORIES`. Models that build their language model from the checkpoint's own architecture
    (``init_vllm_registered_model``) have that architecture's row.
    """
    from vllm.model_executor.models.registry import ModelRegistry

    found = {}
    for architecture, model in ModelRegistry.models.items():
        module, name = model.module_name, model.class_name
        if reaches_experts(module, name):
            found[architecture] = (module, name)
    return found


def reaches_experts(module: str, name: str) -> bool:
    """Return whether a class or function of a module comes to build routed experts."""
    seen, waiting = set(), [(module, name)]
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        for used in _uses(*one):
            if used[1] in FACTORIES:
                return True
            waiting.append(used)
    return False


def _uses(module: str, name: str) -> Iterator[tuple[str, str]]:
    """Return (module, name) of what a definition names, if models define it."""
    source = _source(module)
    if source is None:
        return
    definitions, imports = source
    if name in definitions:
        for used in definitions[name]:
            if used in definitions:
                yield module, used
            elif used in imports:
                yield from ((where, used_there) for where, used_there in imports[used])
    elif name in imports:
        yield from imports[name]


@cache
def _source(module: str):
    """Read a module: what its definitions use, and where imported names come from.

    (definition -> names that it uses, imported name -> places it may come from)
    """
    path = _path(module)
    if path is None:
        return None
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    definitions, imports = {}, {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            where = _absolute(node, package)
            if not set(where.split(".")) & _OTHER_HARDWARE:
                for alias in node.names:
                    imports.setdefault(alias.asname or alias.name, []).append((where, alias.name))
    for node in tree.body:
        names = [node.name] if isinstance(node, (ast.ClassDef, ast.FunctionDef)) else []
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        for name in names:
            used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - {name}
            definitions.setdefault(name, set()).update(used)
    return definitions, imports


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    base = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def _path(module: str) -> Path | None:
    models = ("vllm.model_executor.models", "vllm.models")
    if module in models or not module.startswith(tuple(f"{m}." for m in models)):
        # The layers' own package: only the names of `FACTORIES` count there.
        return None
    # By hand: to find the spec of a module imports its package, and with it a model of some
    # hardware.
    root = Path(importlib.util.find_spec("vllm").origin).parent
    path = root.joinpath(*module.split(".")[1:])
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.exists():
            return candidate
    return None
