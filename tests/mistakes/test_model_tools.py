"""Mistakes with tools for whole models: what is given as a model, freezing, replacing, folding."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import jaxnorm
from jaxnorm.tools import (
    decay_mask,
    fold,
    fold_pair,
    freeze,
    ghost,
    norm_labels,
    norm_mask,
    replace,
    to,
)
from jaxnorm.tools.adapter.models import model_of
from jaxnorm.tools.replacing.frozen import frozen_layer
from mistakes import refused, type_error, value_error, while_tracing, with_values
from mistakes.layers import bound, ones

X = ones(2, 3)


def batch_norm(features=3):
    return nnx.BatchNorm(features, rngs=nnx.Rngs(0))


def layer_norm():
    return nnx.LayerNorm(3, use_bias=False, rngs=nnx.Rngs(0))


def linear():
    return nnx.Linear(3, 3, rngs=nnx.Rngs(0))


def model(*layers):
    return nnx.Sequential(linear(), *layers)


class Coder(nn.Module):
    """A model with another method than its call."""

    @nn.compact
    def __call__(self, x):
        return self.encode(x)

    @nn.compact
    def encode(self, x):
        return nn.BatchNorm(use_running_average=True, name="norm")(x)


@while_tracing
def test_models():
    norm = batch_norm()
    for found, given in (
        ("dict", {"params": {"scale": X}}),
        ("NoneType", None),
        ("function", batch_norm),
        ("State", nnx.state(norm)),
        (type(nnx.BatchNorm).__name__, nnx.BatchNorm),
    ):
        with type_error(f"fold: found {found}, … nnx.Module … fold(model.bind(variables), ...)"):
            model_of(given, "fold")
    with value_error("fold: … BatchNorm has no variables … fold(batchnorm.bind(variables), ...)"):
        model_of(nn.BatchNorm(), "fold")
    endless = {"scale": X}
    endless["again"] = endless
    with value_error("fold: … BatchNorm contains itself … model.bind({'params': params}), ...)"):
        model_of(nn.BatchNorm().bind({"params": endless}), "fold")
    coder = model_of(bound(Coder(), X), "replace")
    says = "encode: … this Coder were exchanged … module.apply(variables, 'encode', ..., method="
    with refused(AttributeError, says):
        coder.rebuilt(coder.arrays, {("norm",): nn.LayerNorm()}).encode(X)


class Skipping(nn.Module):
    """A model that calls its second norm in training only."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.LayerNorm(name="first")(x)
        return nn.LayerNorm(name="second")(x) if train or self.is_initializing() else x


@while_tracing
def test_freezing_and_choosing_norms():
    norms = nnx.List([batch_norm(), layer_norm()])
    with value_error("norm_mask: ['second'] … like norms … train=True … only=lambda path"):
        norm_mask(bound(Skipping(), X), X)
    for tool in (freeze, norm_mask, norm_labels, decay_mask):
        name = tool.__name__
        with value_error(f"{name}: … Coder without a call … {name}(model.bind(variables), x)"):
            tool(bound(Coder(), X))
    with type_error("freeze: only=['0'] must be a pattern … only='block1/*'"):
        freeze(norms, only=["0"])
    with value_error("norm_mask: only='block/*' chooses none of the norms ['0', '1'] … only='*'"):
        norm_mask(norms, only="block/*")

    with value_error("freeze: statistics=True, affine=False … '1' (keeps no … affine=True"):
        freeze(norms, only="1")
    with value_error("freeze: statistics=False, affine=False … '0' ( … '1' ( … affine=True"):
        freeze(norms, statistics=False)
    with value_error("freeze: … a model without norms"):
        freeze(nnx.List([nnx.Param(jnp.zeros(2))]))
    with type_error("frozen_layer: found Dense … normalization layers only … optax.multi_transf"):
        frozen_layer(nn.Dense(3))
    with type_error("frozen_layer: LayerNorm keeps no statistics … statistics=False"):
        frozen_layer(nn.LayerNorm())


@while_tracing
def test_replacements():
    with value_error("to: found no method 'Groupnorm' … 'GroupNorm'"):
        to("Groupnorm", num_groups=2)
    with value_error("to: found no method 'WeightNorm' that normalizes activations"):
        to("WeightNorm")
    with type_error("to: GroupNorm has no options ['groups'] … 'num_groups'"):
        to("GroupNorm", groups=2)
    with type_error("replace: by='GroupNorm' does not say … to('GroupNorm', num_groups=8)"):
        replace(model(batch_norm()), "GroupNorm", X)

    norm = bound(nn.BatchNorm(use_running_average=True), X)
    with value_error("replace: … Linen module BatchNorm without a call … replace(model.bind"):
        replace(norm, ghost(2))
    with value_error("replace: found no batch norm, but 'layers/1' (LayerNorm) … restored(model)"):
        replace(model(layer_norm()), ghost(2), X)
    with value_error("replace: found no batch norm, but '' (GroupNorm) … replaced.restored(model)"):
        replace(replace(norm, to("GroupNorm", num_groups=3), X).model, to("BatchNorm"), X)
    with value_error("replace: found no batch norm, but a model without norms"):
        replace(model(), ghost(2), X)
    with value_error("replace: only='block*' chooses none of the norms ['layers/1']"):
        replace(model(batch_norm()), ghost(2), X, only="block*")

    # The way back.
    replaced = replace(model(batch_norm()), ghost(2), X)
    with value_error("restored: 'layers/1/bias' is missing, … of shape (3,) … restored(model)"):
        replaced.restored(model())
    with value_error("restored: 'layers/1/bias' is of shape (5,), but was of shape (3,)"):
        replaced.restored(model(batch_norm(5)))
    with type_error("restored: found dict, but needs a model with its variables"):
        replaced.restored({})


@while_tracing
def test_what_is_folded():
    kernel = ones(3, 4)
    fitting = {"bias": None, "stats": jaxnorm.Stats(ones(4), ones(4))}
    with type_error("fold_pair: the input is int32 … x.astype(jnp.float32)"):
        fold_pair(kernel.astype(np.int32), **fitting)
    with type_error("fold_pair: needs jaxnorm.Stats, found Moments … jaxnorm.Stats(mean, var)"):
        fold_pair(kernel, None, jaxnorm.moments(kernel, 0))
    with value_error("fold_pair: output_axes=2 is out of range for 2 axes"):
        fold_pair(kernel, **fitting, output_axes=2)
    for what, shape, argument in (
        ("the bias", "(3,)", {"bias": ones(3)}),
        ("the mean", "()", {"stats": jaxnorm.Stats(ones(), ones(4))}),
        ("the variance", "(3,)", {"stats": jaxnorm.Stats(None, ones(3))}),
        ("the scale", "(1, 4)", {"scale": ones(1, 4)}),
        ("the offset", "(2,)", {"offset": ones(2)}),
    ):
        with value_error(f"fold_pair: {what} has shape {shape}, but … (4,) … output_axes="):
            fold_pair(kernel, **fitting | argument)
    with type_error("fold_pair: a float32 kernel … complex64 … kernel.astype(jnp.complex64)"):
        fold_pair(kernel, None, jaxnorm.Stats(ones(4) + 0j, ones(4)))

    with type_error("fold: found ndarray, but needs a model with its variables … model.bind(var"):
        fold(X, X)
    with value_error("fold: the Linen module Dense has no variables … bind(variables)"):
        fold(nn.Dense(3), X)


class Doubled(nnx.Module):
    """A model that goes by the kind of its norm, which no trace shows."""

    def __init__(self):
        self.layer, self.norm = linear(), batch_norm()

    def __call__(self, x):
        return (2.0 if isinstance(self.norm, nnx.BatchNorm) else 1.0) * self.norm(self.layer(x))


class OneOfTwo(nnx.Module):
    """A model with two ways, one of them through a norm."""

    def __init__(self):
        self.layer, self.other, self.norm = linear(), linear(), batch_norm()

    def __call__(self, x, way="norm"):
        y = (self.other if way == "other" else self.layer)(x)
        ways = {"none": lambda y: y, "tanh": jnp.tanh, "sum": lambda y: 1.0 + y}
        return ways.get(way, self.norm)(y)


def transposed(x, kernel, dimensions, **_):
    """A product with another axis of the kernel."""
    return jax.lax.dot_general(x, kernel.T, dimensions)


@with_values
def test_folds_that_change_the_outputs():
    doubled = Doubled()
    with value_error(
        "fold: the outputs differ by … more than tolerance=3.5e-04 … 'norm' alone makes the "
        "largest part … only=lambda path: path != 'norm'."
    ):
        fold(doubled, X)
    # Not seen in zeros alone.
    with value_error("fold: the outputs differ by … only=lambda path: path != 'norm'."):
        fold(doubled, 0 * X)
    norm = batch_norm()
    norm.var[...] = jnp.arange(1.0, 4.0)
    layer = nnx.Linear(3, 3, dot_general=transposed, rngs=nnx.Rngs(0))
    with value_error(
        "fold: what 'layers/0' makes of noise and what the two made of it differ by … "
        "tolerance=3.5e-04 … only=lambda path: path != 'layers/1'."
    ):
        fold(nnx.Sequential(layer, norm), 0 * X)
    norm.mean[...] = jnp.full(3, jnp.nan)
    with value_error("fold: of 6 numbers … returns for the example, 6 are NaN … isfinite"):
        fold(model(norm), X)


@with_values
def test_calls_of_fold_and_of_folded_models():
    with_norm = model(batch_norm())
    with type_error("fold: found traced arrays … Call it outside of jax.jit"):
        jax.eval_shape(lambda x: fold(with_norm, x), X)
    with value_error("fold: … more than tolerance=5.0e-08 … or accept the rounding: tolerance="):
        fold(with_norm, X, tolerance=5e-8)
    with type_error("fold: model(float32[2, 5]) raised TypeError: … . Give an example … fold("):
        fold(with_norm, ones(2, 5))
    with value_error("fold: only='block/*' chooses none of the norms ['layers/1']"):
        fold(with_norm, X, only="block/*")

    folded = fold(OneOfTwo(), X).model
    for way in ("none", "tanh", "sum"):
        with value_error("folded layer 'layer': … not … straight to … 'norm' … fold(model, x"):
            folded(X, way)
    with value_error("folded norm 'norm': … not come straight from the layer … fold(model, x"):
        folded(X, "other")
    with value_error("folded norm: called for training … train=False … model.eval()"):
        folded.norm(X, False)
    domains = jaxnorm.nnx.AdaBN(3, domains=("a", "b"), rngs=nnx.Rngs(0))
    with value_error("folded norm: called for domain='b', … for 'a' … fold(model, x, domain='b')"):
        fold(model(domains), X).model.layers[1](X, domain="b")
