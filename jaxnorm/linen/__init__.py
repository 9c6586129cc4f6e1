"""The methods as Flax Linen modules, with running statistics in the collection `batch_stats`."""

from jaxnorm.linen.modules import BatchNorm as BatchNorm
from jaxnorm.linen.shell import StatsNotMutableError as StatsNotMutableError
