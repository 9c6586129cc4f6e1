"""The methods as Flax NNX modules, with running statistics as `nnx.BatchStat`."""

from jaxnorm.nnx.modules import BatchNorm as BatchNorm
