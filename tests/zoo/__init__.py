"""Load every MoE architecture of an engine, tiny: placed, or refused by name."""
