"""Call SGLang's ``fused_moe_kernel``, align step, activation and sum.

They are called as ``_fused_moe_kernel_sequence`` calls them.

Read in SGLang 0.5.16, 0.5.20 and 0.5.23; what is called is probed by signature.
"""

from __future__ import annotations

import importlib
from functools import cached_property

from .engine import LAUNCH, EngineMatmuls, engine_function

_KERNELS = "sglang.kernels.ops.moe.fused_moe_triton_kernels"
_UTILS = "sglang.srt.layers.moe.moe_runner.triton_utils"
_LAUNCH = (*LAUNCH, "topk_ids", "filter_expert", "bias", "B_zp")
"""Arguments that the launcher is given."""

_TILES = ("w1_shape", "w2_shape", "top_k", "dtype", "M", "return_down_config")


class SglangMatmuls(EngineMatmuls):
    """Multiply by the installed SGLang."""

    zeroes_elsewhere = True

    def __init__(self, interpreted: bool):
        super().__init__(interpreted)
        import sglang

        self._launch = engine_function(_KERNELS, "invoke_fused_moe_kernel", _LAUNCH)
        if not interpreted:
            self._align = engine_function(
                f"{_UTILS}.moe_align_block_size",
                "moe_align_block_size",
                ("topk_ids", "block_size", "num_experts"),
            )
            self._tiles = engine_function(
                f"{_UTILS}.fused_moe_triton_config", "try_get_optimal_moe_config", _TILES
            )
            triton_sum = engine_function(
                _KERNELS, "moe_sum_reduce_triton", ("input", "output", "routed_scaling_factor")
            )
            # On CUDA SGLang itself prefers the one of its kernel library.
            self._sum = getattr(
                importlib.import_module(f"{_UTILS}.fused_moe"), "moe_sum_reduce", triton_sum
            )
            publish_arguments()
        self.name = f"SGLang {sglang.__version__} fused_moe_kernel" + (
            " (Triton interpreter)" if interpreted else ""
        )

    @cached_property
    def _swiglu(self):
        # The launcher's module imports the activation from where this version keeps it, on CUDA
        # only.
        return importlib.import_module(f"{_UTILS}.fused_moe").silu_and_mul

    def choose_tiles(self, x, output, weights):
        config, (down, _) = self._tiles(
            w1_shape=tuple(weights.w13.shape),
            w2_shape=tuple(weights.w2.shape),
            top_k=output.local_slots.shape[1],
            dtype=None,
            M=output.num_rows,
            return_down_config=True,
        )
        # Tensor descriptors are a choice of the launcher, not a tile; the plain loads are used
        # here.
        config, down = (
            {k: v for k, v in c.items() if k != "USE_TMA"} for c in (config, down or config)
        )
        return config, down

    def align(self, output, config):
        return self._align(
            topk_ids=output.local_slots,
            block_size=config["BLOCK_SIZE_M"],
            num_experts=output.num_slots,
        )

    def more_arguments(self, output):
        return {
            "topk_ids": output.local_slots,
            "filter_expert": not output.complete,
            "bias": None,
            "B_zp": None,
        }

    def engine_swiglu(self, values):
        result = values.new_empty((values.shape[0], values.shape[1] // 2))
        self._swiglu(values, result)
        return result

    def engine_sum(self, values):
        result = values.new_empty((values.shape[0], values.shape[2]))
        self._sum(values, result, 1.0)
        return result


def publish_arguments() -> None:
    """Let SGLang's choice of tiles run outside a server: it reads the server's arguments."""
    from sglang.srt.runtime_context import get_server_args

    try:
        get_server_args()
    except ValueError:
        from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

        set_global_server_args_for_scheduler(ServerArgs(model_path="dummy"))
