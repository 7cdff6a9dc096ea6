"""Find tuned configurations of the Triton MoE kernel for ranks with redundant experts.

Both engines look tile sizes up by the number of experts that a rank holds, and their files know the
numbers that models have: 64 or 32, not the 68 or 33 of a rank with redundant experts. What is not
found falls back to untuned defaults, so that a few redundant experts cost far more than their
weights. Tiles depend on the widths of the experts and the tokens of each, which a few more experts
hardly change: the configuration for the number without redundant ones fits.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


class ConfigsOfFewer:
    """Stand around an engine's ``get_moe_configs(E, N, ...)``, which returns None for the untuned.

    Args:
        redundant: redundant experts of each rank; asked at each look-up that is not remembered.
    """

    def __init__(self, redundant: Callable[[], int]):
        self._redundant, self._inside = redundant, False
        self._remembered = functools.lru_cache(self._find)

    # The engines call the number of experts E, also as a keyword.
    def __call__(self, original: Callable, E: int, *args: Any, **kwargs: Any) -> Any:  # noqa: N803
        # SGLang's look-up for the second product asks for the first one's: that is part of one
        # look-up.
        if self._inside:
            return original(E, *args, **kwargs)
        return self._remembered(original, E, *args, **kwargs)

    def _find(self, original: Callable, experts: int, *args: Any, **kwargs: Any) -> Any:
        self._inside = True
        try:
            found, redundant = original(experts, *args, **kwargs), self._redundant()
            if found is not None or not 0 < redundant < experts:
                return found
            without = experts - redundant
            found = original(without, *args, **kwargs)
        finally:
            self._inside = False
        if found is not None:
            logger.info(
                "moe_placement_plugin: the MoE kernel is tuned for %d experts per rank, not for "
                "the %d with redundant ones: that configuration is used",
                without,
                experts,
            )
        return found
