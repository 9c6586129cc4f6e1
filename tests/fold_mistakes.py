"""Mistakes with folding. Part of the table of `test_errors.py`."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from mistakes import Row

import jaxnorm
from jaxnorm.tools.folding.fold import fold
from jaxnorm.tools.folding.fold_pair import fold_pair

X = jnp.ones((2, 3))
KERNEL = jnp.ones((3, 4))
STATS = jaxnorm.Stats(jnp.zeros(4), jnp.ones(4))


class Doubled(nnx.Module):
    """A model that goes by the kind of its norm, which no trace shows."""

    def __init__(self):
        self.layer, self.norm = model().layers

    def __call__(self, x):
        return (2.0 if isinstance(self.norm, nnx.BatchNorm) else 1.0) * self.norm(self.layer(x))


class OneOfTwo(nnx.Module):
    """A model with two ways, one of them through a norm."""

    def __init__(self):
        self.layer, self.norm = model().layers
        self.other, _ = model().layers

    def __call__(self, x, way="norm"):
        y = (self.other if way == "other" else self.layer)(x)
        return {"none": lambda y: y, "tanh": jnp.tanh, "sum": lambda y: 1.0 + y}.get(
            way, self.norm
        )(y)


def transposed(x, kernel, dimensions, **_):
    """A product with another axis of the kernel."""
    return jax.lax.dot_general(x, kernel.T, dimensions)


def nan_model():
    new = model()
    new.layers[1].mean[...] = jnp.full(4, jnp.nan)
    return new


def model():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))


with jax.ensure_compile_time_eval():
    WITH_BATCH_NORM, DOUBLED, NAN = model(), Doubled(), nan_model()
    WITH_BATCH_NORM.eval()
    TRANSPOSED = nnx.Sequential(
        nnx.Linear(4, 4, dot_general=transposed, rngs=nnx.Rngs(0)), model().layers[1]
    )
    TRANSPOSED.layers[1].var[...] = jnp.arange(1.0, 5.0)
    ONE_OF_TWO = OneOfTwo()
    WITH_DOMAINS = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)),
        jaxnorm.nnx.AdaBN(4, domains=("a", "b"), rngs=nnx.Rngs(0)),
    )


def with_values(fun):
    """Makes the mistake where there are values: these models are compared by them."""

    def trigger():
        with jax.ensure_compile_time_eval():
            fun()

    return trigger


ROWS = [
    # One pair
    Row(
        "fold of integers",
        lambda: fold_pair(jnp.ones((3, 4), int), None, STATS),
        TypeError,
        r"^fold_pair: the input is int32.*x\.astype\(jnp\.float32\)",
    ),
    Row(
        "fold by evidence",
        lambda: fold_pair(KERNEL, None, jaxnorm.moments(KERNEL, 0)),
        TypeError,
        r"^fold_pair: needs jaxnorm\.Stats, found Moments.*jaxnorm\.Stats\(mean, var\)",
    ),
    Row(
        "fold along an axis that is not there",
        lambda: fold_pair(KERNEL, None, STATS, output_axes=2),
        ValueError,
        r"^fold_pair: output_axes=2 is out of range for 2 axes",
    ),
    *(
        Row(
            f"fold of {what} that does not fit",
            lambda arguments=arguments: fold_pair(
                KERNEL, **{"bias": None, "stats": STATS} | arguments
            ),
            ValueError,
            rf"^fold_pair: {what} has shape {shape}, but the kernel has \(4,\) along.*output_axes=",
        )
        for what, shape, arguments in (
            ("the bias", r"\(3,\)", {"bias": jnp.ones(3)}),
            ("the mean", r"\(\)", {"stats": jaxnorm.Stats(jnp.ones(()), jnp.ones(4))}),
            ("the variance", r"\(3,\)", {"stats": jaxnorm.Stats(None, jnp.ones(3))}),
            ("the scale", r"\(1, 4\)", {"scale": jnp.ones((1, 4))}),
            ("the offset", r"\(2,\)", {"offset": jnp.ones(2)}),
        )
    ),
    Row(
        "fold of a complex mean into a real kernel",
        lambda: fold_pair(KERNEL, None, jaxnorm.Stats(jnp.ones(4) + 0j, jnp.ones(4))),
        TypeError,
        r"^fold_pair: a float32 kernel cannot hold.*complex64.*kernel\.astype\(jnp\.complex64\)",
    ),
    # Whole models
    Row(
        "fold of an array",
        lambda: fold(KERNEL, X),
        TypeError,
        r"^fold: found \w+, but needs a model with its variables.*model\.bind\(variables\)",
    ),
    Row(
        "fold of a module without variables",
        lambda: fold(nn.Dense(3), X),
        ValueError,
        r"^fold: the Linen module Dense has no variables.*bind\(variables\)",
    ),
    Row(
        "fold under jit",
        lambda: fold(WITH_BATCH_NORM, jnp.cos(X)),
        TypeError,
        r"^fold: found traced arrays.*Call it outside of jax\.jit",
    ),
    Row(
        "fold of a model that goes by its norm",
        with_values(lambda: fold(DOUBLED, X)),
        ValueError,
        r"^fold: the outputs differ by .*more than tolerance=3\.5e-04.*'norm' alone makes the "
        r"largest part.*only=lambda path: path != 'norm'\.$",
    ),
    Row(
        "fold of a model that goes by its norm, unseen in zeros",
        with_values(lambda: fold(DOUBLED, 0 * X)),
        ValueError,
        r"^fold: the outputs differ by .*only=lambda path: path != 'norm'\.$",
    ),
    Row(
        "fold with less rounding than there is",
        with_values(lambda: fold(WITH_BATCH_NORM, X, tolerance=1e-8)),
        ValueError,
        r"^fold: .* more than tolerance=1\.0e-08.*or accept the rounding: tolerance=",
    ),
    Row(
        "fold into a product along another axis",
        with_values(lambda: fold(TRANSPOSED, jnp.zeros((2, 4)))),
        ValueError,
        r"^fold: what 'layers/0' makes of noise and what the two made of it differ by .* "
        r"tolerance=3\.5e-04.*only=lambda path: path != 'layers/1'\.$",
    ),
    Row(
        "fold of a model that returns NaN",
        with_values(lambda: fold(NAN, X)),
        ValueError,
        r"^fold: of 8 numbers .* returns for the example, 8 are NaN.*isfinite",
    ),
    Row(
        "fold by an example of another shape",
        with_values(lambda: fold(WITH_BATCH_NORM, jnp.ones((2, 5)))),
        TypeError,
        r"^fold: model\(float32\[2, 5\]\) raised TypeError: .*\. Give an example of a call.*fold\(",
    ),
    *(
        Row(
            f"folded layer without its norm: {way}",
            with_values(lambda way=way: fold(ONE_OF_TWO, X).model(X, way)),
            ValueError,
            r"^folded layer 'layer': this call does not hand its output straight to the norm "
            r"'norm'.*fold\(model, x",
        )
        for way in ("none", "tanh", "sum")
    ),
    Row(
        "folded norm after another layer",
        with_values(lambda: fold(ONE_OF_TWO, X).model(X, "other")),
        ValueError,
        r"^folded norm 'norm': its input does not come straight from the layer.*fold\(model, x",
    ),
    Row(
        "fold of norms that are not there",
        with_values(lambda: fold(WITH_BATCH_NORM, X, only="block/*")),
        ValueError,
        r"^fold: only='block/\*' chooses none of the norms \['layers/1'\]",
    ),
    Row(
        "training with a folded norm",
        with_values(lambda: fold(WITH_BATCH_NORM, X).model.layers[1](X, False)),
        ValueError,
        r"^folded norm: called for training.*cannot train.*train=False.*model\.eval\(\)",
    ),
    Row(
        "folded norm for another domain",
        with_values(lambda: fold(WITH_DOMAINS, X).model.layers[1](X, domain="b")),
        ValueError,
        r"^folded norm: called for domain='b', but it was folded for 'a'.*"
        r"fold\(model, x, domain='b'\)",
    ),
]
