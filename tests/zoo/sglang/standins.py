"""Stand in for compiled operators that SGLang's models look up when they are imported.

No CPU build on PyPI has them.

Import it before anything of SGLang. Nothing here computes: an operator that is called after all has
no kernel and says so.
"""

from __future__ import annotations

import torch

_OPERATORS = tuple(
    f"{name}() -> ()"
    for name in (
        "fused_sigmoid_mul_cpu",
        "fused_qk_gemma_rmsnorm_cpu",
        "fused_qk_gemma_rmsnorm_with_gate_cpu",
        "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    )
)

# torch drops an operator when the Library object that defined it is collected.
_library = torch.library.Library("sgl_kernel", "FRAGMENT")
for _schema in _OPERATORS:
    if not hasattr(torch.ops.sgl_kernel, _schema.partition("(")[0]):
        _library.define(_schema)
