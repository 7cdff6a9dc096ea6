"""Have SGLang find a module of the tests as one of its plugins."""

from __future__ import annotations

from pathlib import Path

from tests.support.children import python_path


def install_plugin(folder: Path, name: str, module: str) -> str:
    """Write the metadata by which SGLang finds a module; return the PYTHONPATH with which it does.

    Args:
        folder: where to.
        name: of the plugin, in words that `_` joins.
        module: whose ``register`` SGLang calls in every process.
    """
    info = folder / f"{name}-0.dist-info"
    info.mkdir(parents=True)
    project = name.replace("_", "-")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {module}:register\n")
    return python_path(folder)
