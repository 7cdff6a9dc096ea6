"""Decide when experts move and carry one rebalance out."""
