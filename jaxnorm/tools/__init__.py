"""Tools for whole models, Linen and NNX, which stay as they are.

A tool takes a model with its variables, an `nnx.Module` or a Linen module bound to them,
`model.bind(variables)`, and gives back one of the same kind (Linen: `module, variables =
model.unbind()`), which shares no array with the first.

- Inference without norms: `fold`, `fold_pair`.
- Exact statistics of a data set: `population_stats`.
- Other data than in training: `adapt_stats`, `batch_adapter`, `tent`.
- Fine-tuning: `freeze`, `norm_labels`, `norm_mask`, `decay_mask`.
- Other norms: `replace` by `to(...)`, `frozen()`, `ghost(...)`, `synchronized(...)`,
  `unsynchronized()`.
- Weights of other libraries: `import_torch`, `import_keras`, `import_haiku`, `import_equinox`,
  `import_flax`; their defaults: `torch_defaults` and so on; for PyTorch: `export_torch`,
  `save_safetensors`.
- Models trained apart: `merge_replicas`.
"""

from jaxnorm.tools.folding.fold import Folded as Folded
from jaxnorm.tools.folding.fold import fold as fold
from jaxnorm.tools.folding.fold_pair import fold_pair as fold_pair
from jaxnorm.tools.importing.equinox import equinox_arrays as equinox_arrays
from jaxnorm.tools.importing.equinox import import_equinox as import_equinox
from jaxnorm.tools.importing.flax import import_flax as import_flax
from jaxnorm.tools.importing.haiku import import_haiku as import_haiku
from jaxnorm.tools.importing.keras import import_keras as import_keras
from jaxnorm.tools.importing.names import Stack as Stack
from jaxnorm.tools.importing.names import Tied as Tied
from jaxnorm.tools.importing.plan import Imported as Imported
from jaxnorm.tools.importing.presets import equinox_defaults as equinox_defaults
from jaxnorm.tools.importing.presets import flax_defaults as flax_defaults
from jaxnorm.tools.importing.presets import haiku_defaults as haiku_defaults
from jaxnorm.tools.importing.presets import keras_defaults as keras_defaults
from jaxnorm.tools.importing.presets import torch_defaults as torch_defaults
from jaxnorm.tools.importing.safetensors_file import save_safetensors as save_safetensors
from jaxnorm.tools.importing.torch import export_torch as export_torch
from jaxnorm.tools.importing.torch import import_torch as import_torch
from jaxnorm.tools.replacing.freeze import FrozenModel as FrozenModel
from jaxnorm.tools.replacing.freeze import decay_mask as decay_mask
from jaxnorm.tools.replacing.freeze import freeze as freeze
from jaxnorm.tools.replacing.freeze import norm_labels as norm_labels
from jaxnorm.tools.replacing.freeze import norm_mask as norm_mask
from jaxnorm.tools.replacing.replace import Replaced as Replaced
from jaxnorm.tools.replacing.replace import replace as replace
from jaxnorm.tools.replacing.replacements import frozen as frozen
from jaxnorm.tools.replacing.replacements import ghost as ghost
from jaxnorm.tools.replacing.replacements import synchronized as synchronized
from jaxnorm.tools.replacing.replacements import to as to
from jaxnorm.tools.replacing.replacements import unsynchronized as unsynchronized
from jaxnorm.tools.statistics.adapt import adapt_stats as adapt_stats
from jaxnorm.tools.statistics.adapt import batch_adapter as batch_adapter
from jaxnorm.tools.statistics.population import population_stats as population_stats
from jaxnorm.tools.statistics.replicas import merge_replicas as merge_replicas
from jaxnorm.tools.tent import Tent as Tent
from jaxnorm.tools.tent import TentState as TentState
from jaxnorm.tools.tent import tent as tent
