"""What is compiled: single layers and whole models, with this library's norms and with Flax's."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from jaxnorm import linen as jnn
from jaxnorm.core.kernels.use import Use

# What one chip has of x: well over the 128 MiB that it could hold next to its arithmetic units.
IMAGES, TOKENS, SMALL_IMAGES = (256, 64, 64, 256), (64, 2048, 2048), (256, 56, 56, 128)
SEQUENCES = (8, 4096, 2048)
TRAINING: dict[str, Any] = dict(use_running_average=False)
FAST, TWO_PASSES = dict(use_fast_variance=True), dict(use_fast_variance=False)

NO_NORM, OURS, ALWAYS, NEVER = "no norm", "jaxnorm", "jaxnorm, always", "jaxnorm, never"
FLAX, FLAX_FAST, FLAX_TWO_PASSES = "Flax", "Flax, fast variance", "Flax, two passes"
USES: dict[str, Use] = {OURS: "automatic", ALWAYS: "always", NEVER: "never"}

Norm = Callable[[], nn.Module]


class ConvNet(nn.Module):
    """Four times a convolution, a normalization and a relu."""

    norm: Norm | None

    @nn.compact
    def __call__(self, x):
        """The features after the last relu."""
        for _ in range(4):
            x = nn.Conv(x.shape[-1], (3, 3), use_bias=False, dtype=jnp.bfloat16)(x)
            x = nn.relu(x if self.norm is None else self.norm()(x))
        return x


class Block(nn.Module):
    """Two perceptrons, of width 1x and 4x, each behind a normalization and beside a shortcut.

    The first has the products and the memory traffic of a projection into attention and out of it.
    """

    norm: Norm | None

    @nn.compact
    def __call__(self, x, _=None):
        """Maps tokens [N, T, D] to such tokens; in the form of a step of a scan."""
        features = x.shape[-1]
        for width in (features, 4 * features):
            y = x if self.norm is None else self.norm()(x)
            y = nn.relu(nn.Dense(width, use_bias=False, dtype=jnp.bfloat16)(y))
            x = x + nn.Dense(features, use_bias=False, dtype=jnp.bfloat16)(y)
        return x, None


class Transformer(nn.Module):
    """Two blocks with four normalizations, one after the other or as one `nn.scan`."""

    norm: Norm | None
    scan: bool

    @nn.compact
    def __call__(self, x):
        """Maps tokens [N, T, D] to such tokens."""
        if not self.scan:
            for _ in range(2):
                x, _ = Block(self.norm)(x)
            return x
        scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scanned(self.norm)(x, None)[0]


class Candidate(NamedTuple):
    """One thing to measure.

    Attributes:
        name: whose norms it has, and with which kernels or formula.
        make: makes the module.
        shape: of one chip's input.
        kernels: what `use_kernels` is told.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    kernels: Use = "automatic"


def candidates(
    shape: tuple[int, ...],
    ours: Any,
    flax: Any = None,
    *,
    two_passes: bool = True,
    uses: tuple[str, ...] = (OURS,),
    **options: Any,
) -> list[Candidate]:
    """This library's layer beside Flax's with its two formulas for the variance."""
    options = dict(options, dtype=jnp.bfloat16)
    found = [Candidate(use, partial(ours, **options), shape, USES[use]) for use in uses]
    if flax is not None and two_passes:
        found += [
            Candidate(FLAX_FAST, partial(flax, **options, **FAST), shape),
            Candidate(FLAX_TWO_PASSES, partial(flax, **options, **TWO_PASSES), shape),
        ]
    elif flax is not None:
        found += [Candidate(FLAX, partial(flax, **options), shape)]
    return found


def model(make: Callable[..., nn.Module], norms: list[Candidate]) -> list[Candidate]:
    """A model with each of these norms, and with none."""
    bare = Candidate(NO_NORM, partial(make, None), norms[0].shape)
    return [bare, *(one._replace(make=partial(make, one.make)) for one in norms)]


def pair(name: str, **options: Any) -> dict[str, Any]:
    """This library's layer and Flax's."""
    return dict(ours=getattr(jnn, name), flax=getattr(nn, name), **options)


BATCH = pair("BatchNorm", **TRAINING)
LAYER = pair("LayerNorm")
RMS = pair("RMSNorm", two_passes=False)
GROUP = pair("GroupNorm", num_groups=32)
INSTANCE = pair("InstanceNorm")

KERNELS: dict[str, Any] = dict(uses=(OURS, ALWAYS))
METHODS = {
    "BatchNorm": candidates(IMAGES, **BATCH),
    "LayerNorm": candidates(TOKENS, **LAYER, **KERNELS),
    "RMSNorm": candidates(TOKENS, **RMS, **KERNELS),
    "GroupNorm": candidates(IMAGES, **GROUP, **KERNELS),
    "InstanceNorm": candidates(IMAGES, **INSTANCE, **KERNELS),
    "BatchRenorm": candidates(IMAGES, jnn.BatchRenorm, **TRAINING),
    "SwitchableNorm": candidates(IMAGES, jnn.SwitchableNorm, **TRAINING),
    "IBNa": candidates(IMAGES, jnn.IBNa, **TRAINING),
    "AdaBN": candidates(IMAGES, jnn.AdaBN, domains=("photos", "sketches"), **TRAINING),
    "IterNorm": candidates(IMAGES, jnn.IterNorm, **TRAINING),
    "DecorrelatedBatchNorm": candidates(IMAGES, jnn.DecorrelatedBatchNorm, **TRAINING),
    "ConvNet, BatchNorm": model(ConvNet, candidates(SMALL_IMAGES, **BATCH)),
}
"""What is compiled for any number of chips."""

EACH_USE: dict[str, Any] = dict(uses=tuple(USES))
UNROLLED, SCANNED = partial(Transformer, scan=False), partial(Transformer, scan=True)
MODELS = {
    "ConvNet, GroupNorm": model(ConvNet, candidates(SMALL_IMAGES, **GROUP, **EACH_USE)),
    "ConvNet, InstanceNorm": model(ConvNet, candidates(SMALL_IMAGES, **INSTANCE, **EACH_USE)),
    "transformer, LayerNorm": model(UNROLLED, candidates(SEQUENCES, **LAYER, **EACH_USE)),
    "transformer, RMSNorm": model(UNROLLED, candidates(SEQUENCES, **RMS, **EACH_USE)),
    "transformer, RMSNorm, nn.scan": model(SCANNED, candidates(SEQUENCES, **RMS, **EACH_USE)),
}
"""What is compiled for one chip only, by which kernels are chosen."""
