"""Mistakes with frozen layers and with replacements. Part of the table of `test_errors.py`."""

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from mistakes import KEY, Row

from jaxnorm.tools.replacing.frozen import frozen_layer
from jaxnorm.tools.replacing.replace import replace
from jaxnorm.tools.replacing.replacements import ghost, to

X = jnp.zeros((4, 6))


def model(*layers):
    return nnx.Sequential(nnx.Linear(6, 6, rngs=nnx.Rngs(0)), *layers)


def batch_norm(features=6):
    return nnx.BatchNorm(features, rngs=nnx.Rngs(0))


ROWS = [
    Row(
        "freezing a layer that is no norm",
        lambda: frozen_layer(nn.Dense(3)),
        TypeError,
        r"^frozen_layer: found Dense.*normalization layers only.*optax\.multi_transform",
    ),
    Row(
        "freezing statistics that are not there",
        lambda: frozen_layer(nn.LayerNorm()),
        TypeError,
        r"^frozen_layer: LayerNorm keeps no statistics.*statistics=False",
    ),
    Row(
        "replacing by an unknown method",
        lambda: to("Groupnorm", num_groups=2),
        ValueError,
        r"^to: found no method 'Groupnorm'.*'GroupNorm'",
    ),
    Row(
        "replacing by a method of weights",
        lambda: to("WeightNorm"),
        ValueError,
        r"^to: found no method 'WeightNorm' that normalizes activations",
    ),
    Row(
        "replacing with an unknown option",
        lambda: to("GroupNorm", groups=2),
        TypeError,
        r"^to: GroupNorm has no options \['groups'\].*'num_groups'",
    ),
    Row(
        "replacing by what is no replacement",
        lambda: replace(model(batch_norm()), "GroupNorm", X),
        TypeError,
        r"^replace: by='GroupNorm' does not say.*to\('GroupNorm', num_groups=8\)",
    ),
    Row(
        "replacing without a call",
        lambda: replace(nn.BatchNorm(use_running_average=True).bind({}), ghost(2)),
        ValueError,
        r"^replace: found the Linen module BatchNorm without a call.*replace\(model\.bind",
    ),
    Row(
        "replacing in a model without batch norms",
        lambda: replace(model(nnx.LayerNorm(6, rngs=nnx.Rngs(0))), ghost(2), X),
        ValueError,
        r"^replace: found no batch norm, but 'layers/1' \(LayerNorm\).*restored\(model\)",
    ),
    Row(
        "replacing in a Linen model whose batch norms were replaced",
        lambda: replace(
            replace(
                nn.BatchNorm(use_running_average=True).bind(nn.BatchNorm().init(KEY, X, True)),
                to("GroupNorm", num_groups=2),
                X,
            ).model,
            to("BatchNorm"),
            X,
        ),
        ValueError,
        r"^replace: found no batch norm, but '' \(GroupNorm\).*replaced\.restored\(model\)",
    ),
    Row(
        "replacing in a model without norms",
        lambda: replace(model(), ghost(2), X),
        ValueError,
        r"^replace: found no batch norm, but a model without norms",
    ),
    Row(
        "replacing where no path is meant",
        lambda: replace(model(batch_norm()), ghost(2), X, only="block*"),
        ValueError,
        r"^replace: only='block\*' chooses none of the norms \['layers/1'\]",
    ),
    Row(
        "the way back of another model",
        lambda: replace(model(batch_norm()), ghost(2), X).restored(model()),
        ValueError,
        r"^restored: 'layers/1/bias' is missing, but was of shape \(6,\).*restored\(model\)",
    ),
    Row(
        "the way back of a model of other sizes",
        lambda: replace(model(batch_norm()), ghost(2), X).restored(model(batch_norm(5))),
        ValueError,
        r"^restored: 'layers/1/bias' is of shape \(5,\), but was of shape \(6,\)",
    ),
    Row(
        "the way back of variables alone",
        lambda: replace(
            nn.BatchNorm(use_running_average=True).bind(nn.BatchNorm().init(KEY, X, True)),
            ghost(2),
            X,
        ).restored({}),
        TypeError,
        r"^restored: found dict, but needs a model with its variables",
    ),
]
