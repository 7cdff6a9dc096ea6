"""Corrupt expert weights in a serving process: each fault, one rank's layer in place.

A fault takes (layer, other, slots): the tensors of one MoE layer and of another, name -> tensor
``[slots, ...]``, and two slots of this rank. Tensors beside w13 and w2 (scale, zero point, bias)
are those of `attach`.
"""

from __future__ import annotations

import torch

W13, W2 = "w13_weight", "w2_weight"


def attach(module, slots: int) -> None:
    """Give a module of unquantized experts what quantized ones have: scale, zero points, bias."""
    generator = torch.Generator().manual_seed(slots)
    module.register_buffer(
        "w13_weight_scale", torch.rand(slots, 4, generator=generator), persistent=False
    )
    module.register_buffer(
        "w13_qzeros",
        torch.randint(0, 16, (slots, 3), generator=generator, dtype=torch.uint8),
        persistent=False,
    )
    module.register_buffer("w2_bias", torch.randn(slots, 8, generator=generator), persistent=False)


def _bits(tensor):
    """Return the tensor's bytes as a flat view, a row for each slot."""
    return tensor.view(tensor.shape[0], -1).view(torch.uint8)


def flip_bit(name, at):
    def fault(layer, other, a, b):
        flat = _bits(layer[name])[a]
        flat[at % flat.numel()] ^= 1

    return fault


def nan_payload(layer, other, a, b):
    """Change one quiet NaN to another: equal as numbers go, different bits.

    The first is put there before the baseline.
    """
    layer[W2].view(layer[W2].shape[0], -1).view(torch.int32)[a, 5] = 0x7FC00002


def sign_of_zero(layer, other, a, b):
    layer[W2].view(layer[W2].shape[0], -1)[a, 6] = -0.0


def prepare(layer, a) -> None:
    """Put there what `nan_payload` and `sign_of_zero` change."""
    flat = layer[W2].view(layer[W2].shape[0], -1)
    flat.view(torch.int32)[a, 5] = 0x7FC00001
    flat[a, 6] = 0.0


def _swap(tensor, a, b):
    tensor[[a, b]] = tensor[[b, a]].clone()


def swapped_slots(layer, other, a, b):
    for tensor in layer.values():
        _swap(tensor, a, b)


def zeroed(layer, other, a, b):
    for tensor in layer.values():
        tensor[a] = 0


def garbage(layer, other, a, b):
    generator = torch.Generator().manual_seed(7)
    flat = _bits(layer[W13])
    flat[a] = torch.randint(0, 256, flat[a].shape, generator=generator, dtype=torch.uint8)


def copied(layer, other, a, b):
    for tensor in layer.values():
        tensor[a] = tensor[b]


def halves_exchanged(layer, other, a, b):
    row = layer[W13][a].flatten()
    half = row.numel() // 2
    layer[W13][a] = torch.cat([row[half:], row[:half]]).view_as(layer[W13][a])


def rows_exchanged(layer, other, a, b):
    row = layer[W2][a]
    row[[0, 1]] = row[[1, 0]].clone()


def shifted(layer, other, a, b):
    layer[W13][a] = layer[W13][a].flatten().roll(1).view_as(layer[W13][a])


def half_moved(layer, other, a, b):
    """Move w13 and forget w2, as an exchange might."""
    _swap(layer[W13], a, b)


def scale_left_behind(layer, other, a, b):
    for name in (W13, W2):
        _swap(layer[name], a, b)


def other_layer(layer, other, a, b):
    for name in (W13, W2):
        layer[name][a] = other[name][a]


def rounded(layer, other, a, b):
    layer[W13][a] = layer[W13][a].to(torch.bfloat16).to(layer[W13].dtype)


def rolled(layer, other, a, b):
    """Move all slots one further, as an index that is off by one leaves them."""
    for tensor in layer.values():
        tensor.copy_(tensor.roll(1, 0))


def scaled_twice(layer, other, a, b):
    layer["w13_weight_scale"][a] *= 2


def zero_point(layer, other, a, b):
    layer["w13_qzeros"][a, 0] ^= 1


def bias(layer, other, a, b):
    layer["w2_bias"][a, 0] += 1


def processed_twice(layer, other, a, b):
    """Run a kernel's re-packing again over weights that were packed already."""
    layer[W13][a] = layer[W13][a].flatten().view(2, -1).t().reshape(layer[W13][a].shape)


WEIGHT_FAULTS = {
    "one bit of w13": flip_bit(W13, 1234),
    "one bit of w2, last byte": flip_bit(W2, -1),
    "NaN of another payload": nan_payload,
    "sign of a zero": sign_of_zero,
    "two slots exchanged, map unchanged": swapped_slots,
    "replica never filled (zeros)": zeroed,
    "replica never filled (garbage)": garbage,
    "another expert's weights": copied,
    "gate and up exchanged": halves_exchanged,
    "two rows exchanged": rows_exchanged,
    "weights shifted by one element": shifted,
    "w13 moved without w2": half_moved,
    "weights moved without their scales": scale_left_behind,
    "weights of another layer": other_layer,
    "weights rounded through bf16": rounded,
    "a rank's slots off by one": rolled,
    "scale applied twice": scaled_twice,
    "zero point changed": zero_point,
    "bias changed": bias,
    "weights packed twice": processed_twice,
}
"""Name -> fault. Each changes bits of one rank only."""
