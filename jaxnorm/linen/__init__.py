"""The methods as Flax Linen modules, with running statistics in the collection `batch_stats`."""

from jaxnorm.linen.modules import BatchNorm as BatchNorm
from jaxnorm.linen.modules import GroupNorm as GroupNorm
from jaxnorm.linen.modules import InstanceNorm as InstanceNorm
from jaxnorm.linen.modules import LayerNorm as LayerNorm
from jaxnorm.linen.modules import RMSNorm as RMSNorm
from jaxnorm.linen.shell import StatsNotMutableError as StatsNotMutableError
