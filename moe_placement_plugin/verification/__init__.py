"""Tell by fingerprints which expert's weights lie in each physical slot, without moving a weight.

- `definition`: what the digest of a slot is.
- `digests`: computes it where the weights are (`digests_cpu`, `digests_gpu`).
- `slots`: finds an MoE layer's expert tensors.
- `compare`: decides whether replicas, exchanges and checkpoints agree.
- `verify`: a rank's part in a verification.
- `level`: how far weights are verified.
"""
