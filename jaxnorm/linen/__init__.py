"""The methods as Flax Linen modules, with running statistics in the collection `batch_stats`."""

from jaxnorm.linen.batch_family import AdaBN as AdaBN
from jaxnorm.linen.batch_family import BatchRenorm as BatchRenorm
from jaxnorm.linen.batch_family import IBNa as IBNa
from jaxnorm.linen.batch_family import IBNb as IBNb
from jaxnorm.linen.batch_family import SwitchableNorm as SwitchableNorm
from jaxnorm.linen.modules import BatchNorm as BatchNorm
from jaxnorm.linen.modules import GroupNorm as GroupNorm
from jaxnorm.linen.modules import InstanceNorm as InstanceNorm
from jaxnorm.linen.modules import LayerNorm as LayerNorm
from jaxnorm.linen.modules import RMSNorm as RMSNorm
from jaxnorm.linen.shell import StatsNotMutableError as StatsNotMutableError
from jaxnorm.linen.weights import ScaledWeightStandardization as ScaledWeightStandardization
from jaxnorm.linen.weights import SpectralNorm as SpectralNorm
from jaxnorm.linen.weights import WeightNorm as WeightNorm
from jaxnorm.linen.weights import WeightStandardization as WeightStandardization
from jaxnorm.linen.whitening import DecorrelatedBatchNorm as DecorrelatedBatchNorm
from jaxnorm.linen.whitening import IterNorm as IterNorm
