"""The methods as Flax NNX modules, with running statistics as `nnx.BatchStat`."""

from jaxnorm.nnx.modules import BatchNorm as BatchNorm
from jaxnorm.nnx.modules import GroupNorm as GroupNorm
from jaxnorm.nnx.modules import InstanceNorm as InstanceNorm
from jaxnorm.nnx.modules import LayerNorm as LayerNorm
from jaxnorm.nnx.modules import RMSNorm as RMSNorm
