"""Imported once by the server that commands are forked from: the verbs, and the planner with its kernels loaded."""

import numpy as np

import moe_placement_plugin.cli.diff
import moe_placement_plugin.cli.export
import moe_placement_plugin.cli.plan
import moe_placement_plugin.cli.show
import moe_placement_plugin.cli.simulate  # noqa: F401
from moe_placement_plugin.planner import plan

plan(np.arange(1, 17)[None], (8, 8))
