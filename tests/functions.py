"""The pure functions with options that no layer of `subjects.py` gives, each beside its oracle.

Features lie after the examples where a function lets them, groups and several axes are of all
kinds, and statistics are given. Every law of `test_function_laws.py` is tried on each row.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import batch_family_oracles as family
import jax.numpy as jnp
import numpy as np
import oracles
import weight_oracles
import whitening_oracles

import jaxnorm

IMAGES, KERNEL = (4, 3, 2, 6), (3, 3, 2, 6)


class Function(NamedTuple):
    """A pure function and the same by an oracle, both of arrays with the features at the end.

    Attributes:
        name: shown by pytest.
        ours: (x, scale, bias, where=None, **options) -> result.
        oracle: (x, scale, bias, where) -> result, in float64.
        shape: of the input.
        features: shape of scale and bias, None where there is neither.
        bias: whether there is one.
        mask: shape of the mask, None where there is none.
        pools: whether the examples of several devices are normalized together.
        layer: whether a layer trains by it, so that `test_laws.py` differentiates it.
        rtol: for results in float64.
    """

    name: str
    ours: Callable[..., Any]
    oracle: Callable[..., np.ndarray]
    shape: tuple[int, ...] = IMAGES
    features: tuple[int, ...] | None = (6,)
    bias: bool = True
    mask: tuple[int, ...] | None = IMAGES
    pools: bool = False
    layer: bool = True
    rtol: float = 1e-12


def on_axis_1(function, *given, **options):
    """`function` with the features after the examples, of arrays with them at the end."""

    def moved(x, scale, bias, where=None, **more):
        where = None if where is None else jnp.moveaxis(where, -1, 1)
        x, arrays = jnp.moveaxis(x, -1, 1), (*given, scale, bias)
        y = function(x, *arrays, axis=1, where=where, **options, **more)
        return jnp.moveaxis(y[0] if isinstance(y, tuple) else y, 1, -1)

    return moved


def of_params(oracle, **options):
    """An oracle of a dictionary of parameters as one of scale and bias."""

    def of(x, scale, bias, where):
        given = {"scale": scale, "bias": bias}
        params = {name: value for name, value in given.items() if value is not None}
        return oracle(x, params, where, **options)

    return of


# Numbers that float32 holds exactly.
MEAN, VAR = np.linspace(-1, 1, 6, dtype=np.float32), np.linspace(0.5, 2, 6, dtype=np.float32)
STATS, LAST_STATS = jaxnorm.Stats(MEAN, VAR), jaxnorm.Stats(MEAN[2:], VAR[2:])
SHARES = np.float32([0.25, -1.0, 0.75]), np.float32([-0.5, 0.375, 1.25])
FACTORS = np.float32(np.random.default_rng(1).normal(size=(2, 3, 3)))
COV = np.eye(3, dtype=np.float32) + FACTORS @ FACTORS.swapaxes(1, 2)
JOINT = jaxnorm.JointStats(MEAN.reshape(2, 3), COV)


def by_running(x, scale, bias, where):
    return family.affine((x - MEAN) / np.sqrt(np.float64(VAR) + 1e-5), scale, bias)


def renorm(name, rmax, dmax):
    limits = dict(rmax=rmax, dmax=dmax)
    return Function(
        f"batch_renorm {name}",
        on_axis_1(jaxnorm.batch_renorm, STATS, **limits),
        lambda x, s, b, w: family.batch_renorm(x, (MEAN, VAR), s, b, where=w, **limits),
        pools=True,
    )


def whitened(name, ours, oracle, pools=False):
    return Function(name, ours, oracle, mask=(4, 3, 2, 1), pools=pools, layer=pools, rtol=1e-9)


ACTIVATIONS = (
    Function(
        "batch_norm",
        on_axis_1(jaxnorm.batch_norm),
        lambda x, s, b, w: oracles.batch_norm(x, s, b, where=w)[0],
        pools=True,
    ),
    Function(
        "batch_norm_inference",
        on_axis_1(jaxnorm.batch_norm_inference, STATS),
        by_running,
        layer=False,
    ),
    Function(
        "adabn",
        on_axis_1(jaxnorm.adabn, {"a": LAST_STATS, "b": STATS}, domain="b"),
        by_running,
        layer=False,
    ),
    Function(
        "instance_norm", on_axis_1(jaxnorm.instance_norm), of_params(oracles.of_instance_norm)
    ),
    Function(
        "group_norm",
        on_axis_1(jaxnorm.group_norm, num_groups=3),
        of_params(oracles.of_group_norm, num_groups=3),
    ),
    Function(
        "layer_norm of several axes",
        on_axis_1(jaxnorm.layer_norm, axes=(1, 3)),
        of_params(oracles.of_layer_norm, reduction_axes=(2, 3)),
    ),
    Function(
        "rms_norm",
        on_axis_1(lambda x, scale, _, **options: jaxnorm.rms_norm(x, scale, axes=1, **options)),
        of_params(oracles.of_rms_norm),
        bias=False,
    ),
    renorm("as batch norm", 1.0, 0.0),
    renorm("at its limits", 1.05, 0.1),
    renorm("within its limits", 3.0, 5.0),
    renorm("without limits", np.inf, np.inf),
    Function(
        "switchable_norm",
        on_axis_1(jaxnorm.switchable_norm, *SHARES),
        lambda x, s, b, w: family.switchable_norm(x, *SHARES, s, b, where=w),
        pools=True,
    ),
    Function(
        "switchable_norm of several axes",
        lambda x, s, b, where=None, **options: jaxnorm.switchable_norm(
            x, *SHARES, s, b, axis=(-1, 1), batch_axis=(0, 3), where=where, **options
        )[0],
        lambda x, s, b, w: family.switchable_norm(
            x, *SHARES, s, b, axis=(-1, 1), batch_axis=(0, 3), where=w
        ),
        shape=(2, 3, 4, 2, 6),
        features=(3, 6),
        mask=(2, 3, 4, 2, 1),
    ),
    Function(
        "switchable_norm_inference",
        on_axis_1(jaxnorm.switchable_norm_inference, STATS, *SHARES),
        lambda x, s, b, w: family.switchable_norm(
            x, *SHARES, s, b, where=w, running=(MEAN, np.float64(VAR))
        ),
        layer=False,
    ),
    Function(
        "ibn_a",
        on_axis_1(jaxnorm.ibn_a, ratio=0.4),
        lambda x, s, b, w: family.ibn_a(x, s, b, size=2, where=w),
        pools=True,
    ),
    Function(
        "ibn_a_inference",
        on_axis_1(jaxnorm.ibn_a_inference, LAST_STATS, ratio=0.35),
        lambda x, s, b, w: family.ibn_a(
            x, s, b, size=2, where=w, running=(MEAN[2:], np.float64(VAR[2:]))
        ),
        layer=False,
    ),
    Function(
        "ibn_b with a shortcut",
        on_axis_1(lambda x, s, b, **options: jaxnorm.ibn_b(x, x, s, b, **options)),
        lambda x, s, b, w: family.ibn_b(x, x, s, b, where=w),
    ),
    whitened(
        "decorrelated_batch_norm",
        on_axis_1(jaxnorm.decorrelated_batch_norm, num_groups=2),
        lambda x, s, b, w: whitening_oracles.decorrelated_batch_norm(x, s, b, groups=2, where=w),
        pools=True,
    ),
    whitened(
        "iter_norm",
        on_axis_1(jaxnorm.iter_norm, num_groups=None, group_size=3, n_steps=4),
        lambda x, s, b, w: whitening_oracles.iter_norm(x, s, b, groups=2, n_steps=4, where=w),
        pools=True,
    ),
    whitened(
        "decorrelated_batch_norm_inference",
        on_axis_1(jaxnorm.decorrelated_batch_norm_inference, JOINT),
        lambda x, s, b, w: whitening_oracles.decorrelated_batch_norm(
            x, s, b, groups=2, where=w, stats=JOINT
        ),
    ),
    whitened(
        "iter_norm_inference",
        on_axis_1(jaxnorm.iter_norm_inference, JOINT, n_steps=4),
        lambda x, s, b, w: whitening_oracles.iter_norm(
            x, s, b, groups=2, n_steps=4, where=w, stats=JOINT
        ),
    ),
)


def of_weight(name, function, oracle, features=None, bias=False, layer=False, **options):
    """A function of a weight and, if there are `features`, of a factor for each of them."""

    def ours(w, factor, _, where=None, **more):
        arrays = () if features is None or factor is None else (factor,)
        y = function(w, *arrays, **options, **more)
        return y[0] if isinstance(y, tuple) else y

    def expected(w, factor, _, where):
        axis = options.get("axis", -1)
        given = {} if features is None or factor is None else {"scale": factor}
        return oracle(w, *given.values(), axis=() if axis is None else np.atleast_1d(axis))

    return Function(name, ours, expected, KERNEL, features, bias, None, layer=layer, rtol=1e-9)


WEIGHT_NORM = jaxnorm.weight_norm, weight_oracles.weight_norm
PLAIN = jaxnorm.weight_standardization, weight_oracles.weight_standardization
SCALED = jaxnorm.scaled_weight_standardization, weight_oracles.scaled_weight_standardization
SPECTRAL = (
    partial(jaxnorm.spectral_norm, u=MEAN, n_steps=3),
    lambda w, axis: weight_oracles.spectral_norm(w, MEAN, n_steps=3)[0],
)

WEIGHTS = (
    of_weight("weight_norm", *WEIGHT_NORM, features=(6,)),
    of_weight("weight_norm of two axes", *WEIGHT_NORM, features=(3, 6), axis=(-1, 0)),
    of_weight("weight_norm of the whole", *WEIGHT_NORM, features=(), axis=None),
    of_weight("weight_standardization", *PLAIN),
    of_weight("weight_standardization of axis 0", *PLAIN, axis=0),
    of_weight("weight_standardization of two axes", *PLAIN, axis=(-1, 0)),
    of_weight("scaled_weight_standardization", *SCALED, features=(6,)),
    of_weight("scaled_weight_standardization of two axes", *SCALED, features=(3, 6), axis=(-1, 0)),
    of_weight("scaled_weight_standardization of the whole", *SCALED, features=(), axis=()),
    # Its vectors are constants by definition: no difference is what the derivative says.
    of_weight("spectral_norm", *SPECTRAL, layer=True),
)
FUNCTIONS = ACTIVATIONS + WEIGHTS
