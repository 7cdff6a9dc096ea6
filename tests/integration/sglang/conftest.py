"""Give all tests of this folder the answers of stock SGLang."""

from __future__ import annotations

import pytest

from tests.integration.sglang.engines import LONG, Outcome, case, run_cases
from tests.support.children import engine_lock
from tests.support.sglang_fixtures import files, models

__all__ = ["files", "models"]


@pytest.fixture(scope="session")
def stock(models, tmp_path_factory) -> dict[str, Outcome]:
    """Return what each model answers on one rank with nothing asked of the plugin.

    The length for qwen32 is `LONG`.
    """
    cases = [case(name, models[name]) for name in ("qwen32", "qwen30", "glm")]
    cases[0]["max_new_tokens"] = LONG
    with engine_lock():
        return run_cases(cases, tmp_path_factory.mktemp("stock"))
