"""Imported once by the server that ranks are forked from.

What every rank would otherwise load for itself.
"""

import numpy as np
import torch
import torch.distributed  # noqa: F401

from moe_placement_plugin.exchange.executor import Exchange  # noqa: F401

from . import ranks  # noqa: F401
from .cases import drifted, plan_exchange, random_placement

torch.set_num_threads(1)
_rng = np.random.default_rng(0)
_old = random_placement(_rng, 2, 4, [2, 3, 2])
plan_exchange(_old, drifted(_rng, _old)).chunks()
