"""Run the same lm-eval tasks under stock and under each strategy, and compare answers."""
