"""The defaults of frameworks, as options of our layers.

What of them no array shows, `HIDDEN`, an import compares with the model's layers. `momentum` is the
weight of the OLD value here, whatever the framework says.
"""

import inspect
from collections.abc import Mapping
from typing import Any

HIDDEN = ("epsilon", "momentum", "running_var")
"""Options that change what a layer does and that its arrays do not show."""

_FLAX = {
    "BatchNorm": dict(epsilon=1e-5, momentum=0.99, running_var="biased"),
    "LayerNorm": dict(epsilon=1e-6),
    "GroupNorm": dict(epsilon=1e-6, num_groups=32),
    "InstanceNorm": dict(epsilon=1e-6),
    "RMSNorm": dict(epsilon=1e-6),
}

PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "torch": {
        "BatchNorm": dict(epsilon=1e-5, momentum=0.9, running_var="unbiased"),
        "LayerNorm": dict(epsilon=1e-5),
        "GroupNorm": dict(epsilon=1e-5),
        "InstanceNorm": dict(
            epsilon=1e-5, momentum=0.9, running_var="unbiased", use_scale=False, use_bias=False
        ),
        # torch.finfo(torch.float32).eps, where none is given, for bfloat16 and float16 too.
        "RMSNorm": dict(epsilon=2.0**-23),
    },
    "keras": {
        "BatchNorm": dict(epsilon=1e-3, momentum=0.99, running_var="biased"),
        "BatchRenorm": dict(epsilon=1e-3, momentum=0.99, running_var="biased"),
        "LayerNorm": dict(epsilon=1e-3),
        "GroupNorm": dict(epsilon=1e-3, num_groups=32),
        "InstanceNorm": dict(epsilon=1e-3),
        "RMSNorm": dict(epsilon=1e-6),
    },
    # Haiku's batch norm has no default momentum: `decay_rate` is required.
    "haiku": {
        "BatchNorm": dict(epsilon=1e-5, running_var="biased"),
        "LayerNorm": dict(epsilon=1e-5),
        "GroupNorm": dict(epsilon=1e-5),
        "InstanceNorm": dict(epsilon=1e-5),
        "RMSNorm": dict(epsilon=1e-5),
    },
    "equinox": {
        "BatchNorm": dict(epsilon=1e-5, momentum=0.99, running_var="biased"),
        "LayerNorm": dict(epsilon=1e-5),
        "GroupNorm": dict(epsilon=1e-5),
        "InstanceNorm": dict(epsilon=1e-5),
        "RMSNorm": dict(epsilon=1e-5),
    },
    "flax": _FLAX,
}


def torch_defaults(layer: str | type) -> dict[str, Any]:
    """PyTorch's defaults as options of a layer, ours or Flax's.

    Args:
        layer: the name of one of our methods, `"BatchNorm"`, for all options that our layer has;
            or a class, `flax.nnx.BatchNorm`, for those that it takes.

    Returns:
        Options, to construct the layer with: `BatchNorm(**torch_defaults("BatchNorm"))`. `momentum`
        is that of JAX's libraries, the weight of the old value: 1 minus PyTorch's.

    Raises:
        ValueError: PyTorch has no such layer.

    Example:
        >>> from flax import linen as nn, nnx
        >>> from jaxnorm.tools import torch_defaults
        >>> torch_defaults("BatchNorm")
        {'epsilon': 1e-05, 'momentum': 0.9, 'running_var': 'unbiased'}
        >>> torch_defaults(nn.BatchNorm), torch_defaults(nnx.LayerNorm)
        ({'epsilon': 1e-05, 'momentum': 0.9}, {'epsilon': 1e-05})
    """
    return _defaults("torch", layer)


def keras_defaults(layer: str | type) -> dict[str, Any]:
    """Keras 3's defaults as options of a layer, ours or Flax's; see `torch_defaults`.

    Example:
        >>> from jaxnorm.tools import keras_defaults
        >>> keras_defaults("BatchNorm")
        {'epsilon': 0.001, 'momentum': 0.99, 'running_var': 'biased'}
    """
    return _defaults("keras", layer)


def haiku_defaults(layer: str | type) -> dict[str, Any]:
    """Haiku's defaults as options of a layer, ours or Flax's; see `torch_defaults`.

    Example:
        >>> from jaxnorm.tools import haiku_defaults
        >>> haiku_defaults("BatchNorm")
        {'epsilon': 1e-05, 'running_var': 'biased'}
    """
    return _defaults("haiku", layer)


def equinox_defaults(layer: str | type) -> dict[str, Any]:
    """Equinox' defaults as options of a layer, ours or Flax's; see `torch_defaults`.

    Example:
        >>> from jaxnorm.tools import equinox_defaults
        >>> equinox_defaults("BatchNorm")
        {'epsilon': 1e-05, 'momentum': 0.99, 'running_var': 'biased'}
    """
    return _defaults("equinox", layer)


def flax_defaults(layer: str | type) -> dict[str, Any]:
    """Flax' defaults as options of a layer, ours or Flax's; see `torch_defaults`.

    Example:
        >>> from jaxnorm.tools import flax_defaults
        >>> flax_defaults("BatchNorm")
        {'epsilon': 1e-05, 'momentum': 0.99, 'running_var': 'biased'}
    """
    return _defaults("flax", layer)


def _defaults(framework: str, layer: str | type) -> dict[str, Any]:
    name = layer if isinstance(layer, str) else layer.__name__
    presets = PRESETS[framework]
    if name not in presets:
        raise ValueError(
            f"{framework}_defaults: knows no {name!r}. It knows {sorted(presets)}: "
            f"{framework}_defaults('BatchNorm')."
        )
    options = dict(presets[name])
    if isinstance(layer, str):
        return options
    taken = inspect.signature(layer.__init__).parameters
    return {option: value for option, value in options.items() if option in taken}
