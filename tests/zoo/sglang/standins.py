"""Names of compiled operators that SGLang's models look up when they are imported, and that no CPU build on PyPI has.

Import it before anything of SGLang. Nothing here computes: an operator that is called after all has no kernel and says so.
"""

from __future__ import annotations

import torch

_OPERATORS = ("fused_sigmoid_mul_cpu(Tensor a, Tensor b) -> Tensor",)

# torch drops an operator when the Library object that defined it is collected.
_library = torch.library.Library("sgl_kernel", "FRAGMENT")
for _schema in _OPERATORS:
    if not hasattr(torch.ops.sgl_kernel, _schema.partition("(")[0]):
        _library.define(_schema)
