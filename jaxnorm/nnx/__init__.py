"""The methods as Flax NNX modules, with running statistics as `nnx.BatchStat`."""

from jaxnorm.nnx.batch_family import AdaBN as AdaBN
from jaxnorm.nnx.batch_family import BatchRenorm as BatchRenorm
from jaxnorm.nnx.batch_family import IBNa as IBNa
from jaxnorm.nnx.batch_family import IBNb as IBNb
from jaxnorm.nnx.batch_family import SwitchableNorm as SwitchableNorm
from jaxnorm.nnx.modules import BatchNorm as BatchNorm
from jaxnorm.nnx.modules import GroupNorm as GroupNorm
from jaxnorm.nnx.modules import InstanceNorm as InstanceNorm
from jaxnorm.nnx.modules import LayerNorm as LayerNorm
from jaxnorm.nnx.modules import RMSNorm as RMSNorm
from jaxnorm.nnx.weights import ScaledWeightStandardization as ScaledWeightStandardization
from jaxnorm.nnx.weights import SpectralNorm as SpectralNorm
from jaxnorm.nnx.weights import WeightNorm as WeightNorm
from jaxnorm.nnx.weights import WeightStandardization as WeightStandardization
from jaxnorm.nnx.whitening import DecorrelatedBatchNorm as DecorrelatedBatchNorm
from jaxnorm.nnx.whitening import IterNorm as IterNorm
