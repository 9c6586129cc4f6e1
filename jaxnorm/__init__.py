"""Normalization for JAX: statistics, normalizations and their derivatives.

Pure functions and values are here and load no Flax. The Flax modules are in `jaxnorm.linen` and
`jaxnorm.nnx`, what works on whole models in `jaxnorm.tools`, reports in `jaxnorm.diagnose`: all
loaded when first used.
"""

import importlib
from typing import TYPE_CHECKING

from jaxnorm.citation import cite as cite
from jaxnorm.core.comoments import comoments as comoments
from jaxnorm.core.covariance import Comoments as Comoments
from jaxnorm.core.covariance import JointStats as JointStats
from jaxnorm.core.covariance import merge_comoments as merge_comoments
from jaxnorm.core.covariance import pool_comoments as pool_comoments
from jaxnorm.core.kernels.use import use_kernels as use_kernels
from jaxnorm.core.moments import Moments as Moments
from jaxnorm.core.moments import Stats as Stats
from jaxnorm.core.moments import merge as merge
from jaxnorm.core.moments import moments as moments
from jaxnorm.core.moments import pool as pool
from jaxnorm.core.normalize import normalize as normalize
from jaxnorm.core.plain import plain as plain
from jaxnorm.core.replicas import pool_stats as pool_stats
from jaxnorm.core.running import bessel as bessel
from jaxnorm.core.running import cumulative_average as cumulative_average
from jaxnorm.core.running import debiased_ema as debiased_ema
from jaxnorm.core.running import ema as ema
from jaxnorm.core.running import update_running as update_running
from jaxnorm.core.running_covariance import update_running_covariance as update_running_covariance
from jaxnorm.core.standardize import affine as affine
from jaxnorm.core.standardize import standardize as standardize
from jaxnorm.methods.adabn import adabn as adabn
from jaxnorm.methods.batch_norm import batch_norm as batch_norm
from jaxnorm.methods.batch_norm import batch_norm_inference as batch_norm_inference
from jaxnorm.methods.batch_norm_backward import BackwardSteps as BackwardSteps
from jaxnorm.methods.batch_norm_backward import batch_norm_backward as batch_norm_backward
from jaxnorm.methods.batch_norm_backward import (
    batch_norm_backward_steps as batch_norm_backward_steps,
)
from jaxnorm.methods.batch_renorm import batch_renorm as batch_renorm
from jaxnorm.methods.batch_renorm import paper_dmax as paper_dmax
from jaxnorm.methods.batch_renorm import paper_rmax as paper_rmax
from jaxnorm.methods.batch_renorm import update_renorm as update_renorm
from jaxnorm.methods.decorrelated_batch_norm import (
    decorrelated_batch_norm as decorrelated_batch_norm,
)
from jaxnorm.methods.decorrelated_batch_norm import (
    decorrelated_batch_norm_inference as decorrelated_batch_norm_inference,
)
from jaxnorm.methods.ghost_batches import ghost_batches as ghost_batches
from jaxnorm.methods.group_norm import group_norm as group_norm
from jaxnorm.methods.ibn import ibn_a as ibn_a
from jaxnorm.methods.ibn import ibn_a_inference as ibn_a_inference
from jaxnorm.methods.ibn import ibn_b as ibn_b
from jaxnorm.methods.instance_norm import instance_norm as instance_norm
from jaxnorm.methods.iter_norm import iter_norm as iter_norm
from jaxnorm.methods.iter_norm import iter_norm_inference as iter_norm_inference
from jaxnorm.methods.layer_norm import layer_norm as layer_norm
from jaxnorm.methods.rms_norm import rms_norm as rms_norm
from jaxnorm.methods.spectral_norm import spectral_norm as spectral_norm
from jaxnorm.methods.spectral_norm import spectral_norm_inference as spectral_norm_inference
from jaxnorm.methods.switchable_norm import switchable_norm as switchable_norm
from jaxnorm.methods.switchable_norm import switchable_norm_inference as switchable_norm_inference
from jaxnorm.methods.weight_norm import weight_norm as weight_norm
from jaxnorm.methods.weight_standardization import ACTIVATION_GAINS as ACTIVATION_GAINS
from jaxnorm.methods.weight_standardization import (
    scaled_weight_standardization as scaled_weight_standardization,
)
from jaxnorm.methods.weight_standardization import weight_standardization as weight_standardization
from jaxnorm.methods.whitening import color as color
from jaxnorm.methods.whitening import coloring_matrix as coloring_matrix
from jaxnorm.methods.whitening import whiten as whiten
from jaxnorm.methods.whitening import whitening_matrix as whitening_matrix

if TYPE_CHECKING:
    from jaxnorm import diagnose as diagnose
    from jaxnorm import linen as linen
    from jaxnorm import nnx as nnx
    from jaxnorm import tools as tools

__version__ = "0.1.0"


def __getattr__(name: str):
    if name in ("diagnose", "linen", "nnx", "tools"):
        return importlib.import_module(f"jaxnorm.{name}")
    raise AttributeError(f"module 'jaxnorm' has no attribute {name!r}")
