"""Models as users of Flax write them, whose norm layers come from one namespace.

`norms` is `flax.linen` or `jaxnorm.linen`, `flax.nnx` or `jaxnorm.nnx`: to swap them is to change
one import. Nothing else in a model knows which of the two it is.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx


class ResidualBlock(nn.Module):
    features: int
    strides: tuple[int, int]
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        y = self.conv(self.features, (3, 3), self.strides)(x)
        y = nn.relu(self.norm()(y))
        y = self.conv(self.features, (3, 3))(y)
        # Each block starts as its shortcut.
        y = self.norm(scale_init=nn.initializers.zeros_init())(y)
        if x.shape != y.shape:
            x = self.conv(self.features, (1, 1), self.strides, name="shortcut")(x)
            x = self.norm(name="norm_shortcut")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Images to logits, with batch norm, or with group norm if `num_groups` is given."""

    norms: Any
    num_groups: int | None = None
    stages: Sequence[int] = (4, 8)
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_fast_variance: bool = True

    @nn.compact
    def __call__(self, x, train=True):
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        conv = functools.partial(nn.Conv, use_bias=False, **dtypes)
        options = dict(epsilon=1e-5, use_fast_variance=self.use_fast_variance, **dtypes)
        if self.num_groups is None:
            norm = functools.partial(
                self.norms.BatchNorm, use_running_average=not train, momentum=0.9, **options
            )
        else:
            norm = functools.partial(self.norms.GroupNorm, num_groups=self.num_groups, **options)
        x = nn.relu(norm(name="norm_stem")(conv(4, (3, 3), name="stem")(x)))
        for stage, features in enumerate(self.stages):
            x = ResidualBlock(features, (2, 2) if stage else (1, 1), conv, norm)(x)
        return nn.Dense(3, **dtypes)(x.mean((1, 2)))


class TransformerBlock(nn.Module):
    norm: Any
    dtypes: Any

    @nn.compact
    def __call__(self, x, mask):
        attention = nn.MultiHeadDotProductAttention(2, normalize_qk=True, **self.dtypes)
        x = x + attention(self.norm(name="norm_attention")(x), mask=mask)
        y = nn.gelu(nn.Dense(16, **self.dtypes)(self.norm(name="norm_mlp")(x)))
        return x + nn.Dense(x.shape[-1], **self.dtypes)(y), None


class Transformer(nn.Module):
    """Sequences to next-step predictions: two scanned and rematerialized pre-norm blocks."""

    norms: Any
    use_rms: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_fast_variance: bool = True

    @nn.compact
    def __call__(self, x, train=True):
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        scale_init = nn.with_partitioning(nn.initializers.ones, ("features",))
        norm = functools.partial(
            self.norms.RMSNorm if self.use_rms else self.norms.LayerNorm,
            scale_init=scale_init,
            use_fast_variance=self.use_fast_variance,
            **dtypes,
        )
        blocks = nn.scan(
            nn.remat(TransformerBlock, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        causal = nn.make_causal_mask(x[..., 0])
        x, _ = blocks(norm, dtypes, name="blocks")(nn.Dense(8, **dtypes)(x), causal)
        return nn.Dense(3, **dtypes)(norm(name="norm_final")(x))


class NNXNet(nnx.Module):
    """Images to logits, through one norm of each kind."""

    def __init__(
        self,
        norms: Any,
        rngs: nnx.Rngs,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_fast_variance: bool = True,
    ):
        dtypes: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        options = dict(use_fast_variance=use_fast_variance, **dtypes)
        self.conv = nnx.Conv(2, 4, (3, 3), use_bias=False, rngs=rngs, **dtypes)
        self.batch_norm = norms.BatchNorm(4, momentum=0.9, rngs=rngs, **options)
        self.mixer = nnx.Conv(4, 8, (3, 3), strides=2, rngs=rngs, **dtypes)
        self.group_norm = norms.GroupNorm(8, num_groups=2, rngs=rngs, **options)
        self.layer_norm = norms.LayerNorm(8, rngs=rngs, **options)
        self.hidden = nnx.Linear(8, 16, rngs=rngs, **dtypes)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.rms_norm = norms.RMSNorm(16, rngs=rngs, **options)
        self.head = nnx.Linear(16, 3, rngs=rngs, **dtypes)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.batch_norm(self.conv(x)))
        x = nnx.relu(self.group_norm(self.mixer(x)))
        x = x + nnx.gelu(self.layer_norm(x))
        x = self.dropout(nnx.gelu(self.hidden(x)))
        return self.head(self.rms_norm(x).mean((1, 2)))
