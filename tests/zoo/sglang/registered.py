"""Find the model classes of the installed SGLang that build MoE layers.

It asks its sources and its registry.

A module counts when it builds ``FusedMoE`` (or what `get_moe_impl_class` gives) or imports a model
module that does; so does every class that such a module registers. Modules that cannot be imported
on a CPU have no classes in the registry, so their sources are read.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from functools import lru_cache
from pathlib import Path

_BUILDS = ("FusedMoE", "get_moe_impl_class", "DeepEPMoE")
_PACKAGE = "sglang.srt.models"


@lru_cache(maxsize=1)
def _modules() -> dict[str, ast.Module]:
    package = importlib.import_module(_PACKAGE)
    found = {}
    for module in pkgutil.walk_packages(package.__path__, f"{_PACKAGE}."):
        spec = module.module_finder.find_spec(module.name, None)
        found[module.name] = ast.parse(Path(spec.origin).read_text())
    return found


def _names(tree: ast.Module) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _imported(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@lru_cache(maxsize=1)
def moe_modules() -> frozenset[str]:
    """Return the model modules that build MoE layers, by themselves or through another."""
    modules = _modules()
    found = {name for name, tree in modules.items() if _names(tree) & set(_BUILDS)}
    while more := {
        name for name, tree in modules.items() if name not in found and _imported(tree) & found
    }:
        found |= more
    return frozenset(found)


def moe_classes() -> dict[str, str]:
    """Return the module of every class that a module with MoE layers registers.

    Among them are classes that it would register if it could be imported.
    """
    return {entry: name for name in sorted(moe_modules()) for entry in _entries(_modules()[name])}


def _entries(tree: ast.Module) -> list[str]:
    """Return the names in a module's ``EntryClass``."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(t, ast.Name) and t.id == "EntryClass" for t in targets):
            items = (
                node.value.elts if isinstance(node.value, (ast.List, ast.Tuple)) else [node.value]
            )
            return [item.id for item in items if isinstance(item, ast.Name)]
    return []


def why_not_imported(module: str) -> str:
    """Return what importing a model module fails with; empty when it does not."""
    try:
        importlib.import_module(module)
    except Exception as error:  # noqa: BLE001  # SGLang's registry passes over all of them
        return f"{type(error).__name__}: {error}"
    return ""
