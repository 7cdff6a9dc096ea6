"""Run engines on one GPU in place of many.

``shared`` and ``lone`` hold a ``sitecustomize`` each, which says what it does.
"""

from __future__ import annotations

import os
from pathlib import Path

HERE = Path(__file__).parent


def environment(kind: str, engine: str, *folders: Path) -> dict[str, str]:
    """Return the variables that an engine is started with.

    Args:
        kind: ``shared`` or ``lone``.
        engine: ``vllm`` or ``sglang``.
        folders: more that Python is to find modules in, before those it is given already.
    """
    path = os.pathsep.join(
        map(str, filter(None, [HERE / kind, *folders, os.environ.get("PYTHONPATH")]))
    )
    return {"PYTHONPATH": path} | (
        {"VLLM_DISABLE_PYNCCL": "1", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0"} if engine == "vllm" else {}
    )
