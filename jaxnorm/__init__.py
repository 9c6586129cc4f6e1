"""Normalization for JAX: statistics, normalizations and their derivatives.

Pure functions and values are here and load no Flax. The Flax modules are in `jaxnorm.linen` and
`jaxnorm.nnx`, loaded when first used.
"""

import importlib
from typing import TYPE_CHECKING

from jaxnorm.citation import cite as cite
from jaxnorm.core.moments import Moments as Moments
from jaxnorm.core.moments import Stats as Stats
from jaxnorm.core.moments import merge as merge
from jaxnorm.core.moments import moments as moments
from jaxnorm.core.moments import pool as pool
from jaxnorm.core.normalize import normalize as normalize
from jaxnorm.core.running import bessel as bessel
from jaxnorm.core.running import cumulative_average as cumulative_average
from jaxnorm.core.running import debiased_ema as debiased_ema
from jaxnorm.core.running import ema as ema
from jaxnorm.core.running import update_running as update_running
from jaxnorm.core.standardize import affine as affine
from jaxnorm.core.standardize import standardize as standardize
from jaxnorm.methods.batch_norm import batch_norm as batch_norm
from jaxnorm.methods.batch_norm import batch_norm_inference as batch_norm_inference
from jaxnorm.methods.batch_norm_backward import BackwardSteps as BackwardSteps
from jaxnorm.methods.batch_norm_backward import batch_norm_backward as batch_norm_backward
from jaxnorm.methods.batch_norm_backward import (
    batch_norm_backward_steps as batch_norm_backward_steps,
)
from jaxnorm.methods.group_norm import group_norm as group_norm
from jaxnorm.methods.instance_norm import instance_norm as instance_norm
from jaxnorm.methods.layer_norm import layer_norm as layer_norm
from jaxnorm.methods.rms_norm import rms_norm as rms_norm

if TYPE_CHECKING:
    from jaxnorm import linen as linen
    from jaxnorm import nnx as nnx

__version__ = "0.1.0"


def __getattr__(name: str):
    if name in ("linen", "nnx"):
        return importlib.import_module(f"jaxnorm.{name}")
    raise AttributeError(f"module 'jaxnorm' has no attribute {name!r}")
