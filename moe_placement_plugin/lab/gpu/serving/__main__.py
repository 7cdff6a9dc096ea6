"""Serve one model with each placement and compare them.

    python -m moe_placement_plugin.lab.gpu.serving --engine vllm --ranks 2 --model qwen3-30b-a3b \\
        --load examples/deepseek-r1/in8k_out1k.safetensors --json out.json

What is compared: tokens, balancedness, throughput, latency, the longest pause. As many servers as
``--at-once`` says are up and take turns, round after round in alternating order, so that they see
the same machine; each batch of them has the first contestant and the ideal with it. Checkpoints are
made here, with routers whose load follows the recorded one (``--load``); what is really served is
recorded first, and ``eplb`` plans from that. ``ideal`` is the same model with a router that loads
all experts alike. Without a GPU (``--cpu --model tiny --workload tiny``) it shows that it works,
and nothing else.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from .... import PlacementError
from .arguments import parse
from .run import Run


def main() -> int:
    """Run what the command line asks for; 1 when a server failed, 2 when nothing could be run."""
    given = parse(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = Run(given, given.folder or Path(folder))
            run.all()
        except PlacementError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 1 if run.journal.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
