"""Name the rules of ``--expert-rebalance`` under which experts move whenever an engine asks."""

ANY_GAIN = {"min_gain": 0.0, "hysteresis": 0.0, "small_batches": False}

ANY_GAIN_AND_PHASE = ANY_GAIN | {"max_phase_loss": 0.5}
"""The same, though prompts or generation lose by it."""
