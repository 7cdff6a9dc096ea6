"""Turn a recording published by NVIDIA/srt-slurm into the file that is shipped here.

It holds MoE layers only, int32 counts.

    python convert.py expert_distribution_fp4_1k1k_compressed.pt in1k_out1k.safetensors

The counts stay as published. Needs torch, in whose format they are published.
"""

import json
import sys

import numpy as np
from safetensors.numpy import save_file

from moe_placement_plugin.formats.load_file import read_load

SOURCE = "github.com/NVIDIA/srt-slurm, configs/expert-distributions, commit 2ee9362"


def main(source: str, target: str) -> None:
    """Write ``target`` from the ``.pt`` file ``source``."""
    load = read_load(source).moe_layers()
    metadata = {
        "model": "DeepSeek-R1",
        "top_k": 8,
        "source": f"{SOURCE}, {source.rsplit('/', 1)[-1]}",
        "licence": "Apache-2.0, Copyright (c) 2025 NVIDIA CORPORATION & AFFILIATES",
        "changes": "rows of the three dense layers left out, counts as int32",
    }
    header = {
        "format": "moe-expert-load",
        "version": "1",
        "layer_ids": json.dumps(load.layer_ids),
        "phases": json.dumps(load.phases),
        "metadata": json.dumps(metadata),
    }
    assert load.counts.max() <= np.iinfo(np.int32).max, "a count does not fit into an int32"
    save_file({"counts": load.counts.astype(np.int32)}, target, header)


if __name__ == "__main__":
    main(*sys.argv[1:])
