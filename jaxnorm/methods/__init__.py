"""The methods, one file each, and the registry that lists them.

A method is its file (paper, formula, when to use, pure function, spec) and one row here. The tests
go through the rows, and fail with what is missing if a method lacks a Linen class, an NNX class, a
public function, an oracle, a test case, or a place in the documentation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxnorm.methods import papers
from jaxnorm.methods.adabn import AdaBN, adabn
from jaxnorm.methods.batch_norm import BatchNorm, batch_norm
from jaxnorm.methods.batch_renorm import BatchRenorm, batch_renorm
from jaxnorm.methods.decorrelated_batch_norm import (
    DecorrelatedBatchNorm,
    decorrelated_batch_norm,
)
from jaxnorm.methods.group_norm import GroupNorm, group_norm
from jaxnorm.methods.ibn import IBNa, IBNb, ibn_a, ibn_b
from jaxnorm.methods.instance_norm import InstanceNorm, instance_norm
from jaxnorm.methods.iter_norm import IterNorm, iter_norm
from jaxnorm.methods.layer_norm import LayerNorm, layer_norm
from jaxnorm.methods.papers import Paper
from jaxnorm.methods.rms_norm import RMSNorm, rms_norm
from jaxnorm.methods.spectral_norm import SpectralNorm, spectral_norm
from jaxnorm.methods.switchable_norm import SwitchableNorm, switchable_norm
from jaxnorm.methods.weight_norm import WeightNorm, weight_norm
from jaxnorm.methods.weight_standardization import (
    ScaledWeightStandardization,
    WeightStandardization,
    scaled_weight_standardization,
    weight_standardization,
)


class Method(NamedTuple):
    """One row of the registry.

    Attributes:
        name: of the Linen and NNX classes.
        spec: the class of options that both inherit.
        function: the pure function.
        title: as in a sentence.
        papers: where it comes from, the first its own.
        statistics: what is estimated.
        pooled_over: what the estimate is taken over.
        state: names of variables that are no parameters; in brackets, those of options.
        mask: what a mask may tell apart, or "" for none.
        devices: whether it can pool over mapped axes.
        derivatives: which there are.
    """

    name: str
    spec: type
    function: Callable[..., Any]
    title: str
    papers: tuple[Paper, ...]
    statistics: str
    pooled_over: str
    state: str = ""
    mask: str = "elements"
    devices: bool = True
    derivatives: str = "every order, forward and reverse"


METHODS = (
    Method(
        name="BatchNorm",
        spec=BatchNorm,
        function=batch_norm,
        title="batch normalization",
        papers=(papers.BATCH_NORM,),
        statistics="mean, variance",
        pooled_over="batch and space, for each feature",
        state="mean, var (updates)",
    ),
    Method(
        name="LayerNorm",
        spec=LayerNorm,
        function=layer_norm,
        title="layer normalization",
        papers=(papers.LAYER_NORM,),
        statistics="mean, variance",
        pooled_over="features, for each example and position",
    ),
    Method(
        name="RMSNorm",
        spec=RMSNorm,
        function=rms_norm,
        title="root mean square normalization",
        papers=(papers.RMS_NORM,),
        statistics="mean square",
        pooled_over="features, for each example and position",
    ),
    Method(
        name="GroupNorm",
        spec=GroupNorm,
        function=group_norm,
        title="group normalization",
        papers=(papers.GROUP_NORM,),
        statistics="mean, variance",
        pooled_over="groups of features and space, for each example",
    ),
    Method(
        name="InstanceNorm",
        spec=InstanceNorm,
        function=instance_norm,
        title="instance normalization",
        papers=(papers.INSTANCE_NORM,),
        statistics="mean, variance",
        pooled_over="space, for each example and feature",
        state="(mean, var, updates)",
    ),
    Method(
        name="BatchRenorm",
        spec=BatchRenorm,
        function=batch_renorm,
        title="batch renormalization",
        papers=(papers.BATCH_RENORM,),
        statistics="mean, variance, and the running ones",
        pooled_over="batch and space, for each feature",
        state="mean, var, step (updates)",
        derivatives="every order, forward and reverse; r and d are constants",
    ),
    Method(
        name="AdaBN",
        spec=AdaBN,
        function=adabn,
        title="adaptive batch normalization: statistics for each domain",
        papers=(papers.ADABN, papers.ADVPROP),
        statistics="mean, variance",
        pooled_over="batch and space of one domain, for each feature",
        state="for each domain mean, var (updates)",
    ),
    Method(
        name="DecorrelatedBatchNorm",
        spec=DecorrelatedBatchNorm,
        function=decorrelated_batch_norm,
        title="decorrelated batch normalization (ZCA whitening)",
        papers=(papers.DECORRELATED_BATCH_NORM,),
        statistics="mean, covariance",
        pooled_over="batch and space, for each group of features",
        state="mean, cov (updates)",
        mask="examples and positions",
    ),
    Method(
        name="IterNorm",
        spec=IterNorm,
        function=iter_norm,
        title="iterative normalization (Newton whitening)",
        papers=(papers.ITER_NORM,),
        statistics="mean, covariance",
        pooled_over="batch and space, for each group of features",
        state="mean, cov (updates)",
        mask="examples and positions",
    ),
    Method(
        name="SwitchableNorm",
        spec=SwitchableNorm,
        function=switchable_norm,
        title="switchable normalization",
        papers=(papers.SWITCHABLE_NORM,),
        statistics="mean, variance, of three kinds",
        pooled_over="instance, layer and batch, mixed by learned weights",
        state="mean, var (updates)",
    ),
    Method(
        name="IBNa",
        spec=IBNa,
        function=ibn_a,
        title="IBN-a: instance norm for some features, batch norm for the others",
        papers=(papers.IBN_NET,),
        statistics="mean, variance",
        pooled_over="instance, or batch and space, for each feature",
        state="mean, var (updates), of the batch's features",
    ),
    Method(
        name="IBNb",
        spec=IBNb,
        function=ibn_b,
        title="IBN-b: instance norm of a residual sum",
        papers=(papers.IBN_NET,),
        statistics="mean, variance",
        pooled_over="space, for each example and feature",
    ),
    Method(
        name="WeightNorm",
        spec=WeightNorm,
        function=weight_norm,
        title="weight normalization",
        papers=(papers.WEIGHT_NORM,),
        statistics="norm of a weight",
        pooled_over="inputs, for each output",
        mask="",
        devices=False,
    ),
    Method(
        name="SpectralNorm",
        spec=SpectralNorm,
        function=spectral_norm,
        title="spectral normalization",
        papers=(papers.SPECTRAL_NORM,),
        statistics="largest singular value of a weight",
        pooled_over="the whole weight",
        state="u, sigma",
        mask="",
        devices=False,
        derivatives="every order, forward and reverse; u and v are constants",
    ),
    Method(
        name="WeightStandardization",
        spec=WeightStandardization,
        function=weight_standardization,
        title="weight standardization",
        papers=(papers.WEIGHT_STANDARDIZATION,),
        statistics="mean, variance of a weight",
        pooled_over="inputs, for each output",
        mask="",
        devices=False,
    ),
    Method(
        name="ScaledWeightStandardization",
        spec=ScaledWeightStandardization,
        function=scaled_weight_standardization,
        title="scaled weight standardization",
        papers=(papers.SCALED_WEIGHT_STANDARDIZATION,),
        statistics="mean, variance of a weight",
        pooled_over="inputs, for each output",
        mask="",
        devices=False,
    ),
)
