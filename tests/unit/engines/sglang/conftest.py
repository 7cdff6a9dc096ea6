"""Share checkpoints and files among all tests of this folder."""

from tests.support.sglang_fixtures import files, models

__all__ = ["files", "models"]
