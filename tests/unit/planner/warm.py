"""Load verbs and the planner with its kernels, for the server that commands are forked from."""

import numpy as np

import moe_placement_plugin.cli.diff
import moe_placement_plugin.cli.export
import moe_placement_plugin.cli.plan
import moe_placement_plugin.cli.show
import moe_placement_plugin.cli.simulate  # noqa: F401
from moe_placement_plugin.planner import plan

plan(np.arange(1, 17)[None], (8, 8))
