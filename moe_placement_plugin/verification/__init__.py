"""Fingerprints of expert weights: what lies in each physical slot, told apart without moving a weight.

`definition` says what the digest is, `digests` computes it where the weights are, `slots` finds an MoE layer's expert
tensors, `compare` decides whether replicas, exchanges and checkpoints agree.
"""
