"""Name SGLang's device before it is imported, which some of these tests do."""

from __future__ import annotations

import importlib.util
import os

if importlib.util.find_spec("sglang"):
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
