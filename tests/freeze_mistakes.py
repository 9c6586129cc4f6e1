"""Mistakes with freezing and with choosing norms. Part of the table of `test_errors.py`."""

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from mistakes import KEY, Row
from tool_models import Branches, vector

from jaxnorm.tools.replacing.freeze import decay_mask, freeze, norm_labels, norm_mask


def normed():
    rngs = nnx.Rngs(0)
    return nnx.List([nnx.BatchNorm(2, rngs=rngs), nnx.LayerNorm(2, use_bias=False, rngs=rngs)])


def bound():
    return Branches().bind(Branches().init(KEY, vector()))


class Skipping(nn.Module):
    """A model that calls its second norm in training only."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.LayerNorm(name="first")(x)
        return nn.LayerNorm(name="second")(x) if train or self.is_initializing() else x


ROWS = [
    Row(
        "a mask of norms that the call does not reach",
        lambda: norm_mask(Skipping().bind(Skipping().init(KEY, vector())), vector()),
        ValueError,
        r"^norm_mask: \['second'\] have variables like norms.*train=True.*only=lambda path",
    ),
    *(
        Row(
            f"{tool.__name__} of a Linen model without a call",
            lambda tool=tool: tool(bound()),
            ValueError,
            rf"^{tool.__name__}: .*Branches without a call.*"
            rf"{tool.__name__}\(model\.bind\(variables\), x\)",
        )
        for tool in (freeze, norm_mask, norm_labels, decay_mask)
    ),
    Row(
        "norms chosen by a list",
        lambda: freeze(normed(), only=["0"]),
        TypeError,
        r"^freeze: only=\['0'\] must be a pattern.*only='block1/\*'",
    ),
    Row(
        "norms chosen by names that none has",
        lambda: norm_mask(normed(), only="block/*"),
        ValueError,
        r"^norm_mask: only='block/\*' chooses none of the norms \['0', '1'\].*only='\*'",
    ),
    Row(
        "freezing of statistics where there are none",
        lambda: freeze(normed(), only="1"),
        ValueError,
        r"^freeze: statistics=True, affine=False.*'1' \(keeps no statistics\).*affine=True",
    ),
    Row(
        "freezing of nothing",
        lambda: freeze(normed(), statistics=False),
        ValueError,
        r"^freeze: statistics=False, affine=False.*'0' \(.*'1' \(.*affine=True",
    ),
    Row(
        "freezing of a model without norms",
        lambda: freeze(nnx.List([nnx.Param(jnp.zeros(2))])),
        ValueError,
        r"^freeze: .*a model without norms",
    ),
]
