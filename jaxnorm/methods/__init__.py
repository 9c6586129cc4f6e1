"""The methods, one file each, and the registry that lists them.

A method is its file (paper, formula, when to use, pure function, spec) and one row here. The tests
go through the rows, and fail with what is missing if a method lacks a Linen class, an NNX class, a
public function, an oracle, a test case, or a place in the documentation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxnorm.methods import papers
from jaxnorm.methods.batch_norm import BatchNorm, batch_norm
from jaxnorm.methods.group_norm import GroupNorm, group_norm
from jaxnorm.methods.instance_norm import InstanceNorm, instance_norm
from jaxnorm.methods.layer_norm import LayerNorm, layer_norm
from jaxnorm.methods.papers import Paper
from jaxnorm.methods.rms_norm import RMSNorm, rms_norm


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
)
