"""The pure functions by their public names, with the arguments that layers do not give, by oracles.

What the layers do with them, and their derivatives, masks and dtypes, is in `test_laws.py`.
"""

import inspect

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import weight_oracles
import whitening_oracles
from modules import draw

import jaxnorm

RNG = np.random.default_rng(0)
X = np.asarray(draw((4, 3, 2, 6)), np.float64) + 1
WHERE = RNG.random((4, 3, 2, 1)) < 0.7
SCALE, BIAS = RNG.normal(size=6) + 1, RNG.normal(size=6)
PARAMS = {"scale": SCALE, "bias": BIAS}
KERNEL = RNG.normal(size=(3, 3, 2, 6))


def channels_first(function):
    """A function of arrays with the features at the end, of arrays with them after the batch."""

    def moved(x, *arguments, where=None, **options):
        where = None if where is None else np.moveaxis(where, -1, 1)
        y = function(np.moveaxis(x, -1, 1), *arguments, where=where, axis=1, **options)
        y = y[0] if isinstance(y, tuple) else y
        return np.moveaxis(y, 1, -1)

    return moved


# The function, and the same by an oracle: of input, scale, bias, mask.
ACTIVATIONS = {
    "batch_norm": (
        channels_first(jaxnorm.batch_norm),
        lambda x, s, b, w: oracles.batch_norm(x, s, b, where=w)[0],
    ),
    "instance_norm": (
        channels_first(lambda *a, **o: jaxnorm.instance_norm(*a, **o)),
        lambda x, s, b, w: oracles.of_instance_norm(x, PARAMS, w),
    ),
    "group_norm": (
        channels_first(lambda *a, **o: jaxnorm.group_norm(*a, num_groups=3, **o)),
        lambda x, s, b, w: oracles.of_group_norm(x, PARAMS, w, num_groups=3),
    ),
    "layer_norm": (
        channels_first(lambda *a, **o: jaxnorm.layer_norm(*a, axes=(1, 3), **o)),
        lambda x, s, b, w: oracles.of_layer_norm(x, PARAMS, w, reduction_axes=(2, 3)),
    ),
    "rms_norm": (
        channels_first(lambda x, s, b, **o: jaxnorm.rms_norm(x, s, axes=1, **o)),
        lambda x, s, b, w: oracles.of_rms_norm(x, {"scale": s}, w),
    ),
    "decorrelated_batch_norm": (
        channels_first(lambda *a, **o: jaxnorm.decorrelated_batch_norm(*a, num_groups=2, **o)),
        lambda x, s, b, w: whitening_oracles.decorrelated_batch_norm(x, s, b, groups=2, where=w),
    ),
    "iter_norm": (
        channels_first(
            lambda *a, **o: jaxnorm.iter_norm(*a, num_groups=None, group_size=3, n_steps=4, **o)
        ),
        lambda x, s, b, w: whitening_oracles.iter_norm(x, s, b, groups=2, n_steps=4, where=w),
    ),
}


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_features_on_another_axis(x64, name, masked):
    ours, oracle = ACTIVATIONS[name]
    where = WHERE if masked else None
    expected = oracle(X, SCALE, BIAS, where)
    np.testing.assert_allclose(ours(X, SCALE, BIAS, where=where), expected, rtol=1e-9, atol=1e-9)
    narrow = ours(X.astype(np.float32), SCALE, BIAS, where=where, dtype=jnp.float32)
    assert narrow.dtype == np.float32
    np.testing.assert_allclose(narrow, expected, rtol=1e-4, atol=1e-4)
    counts = np.rint(4 * X).astype(np.int8)
    found, wide = (
        ours(x, SCALE, BIAS, where=where, dtype=None) for x in (counts, counts.astype(np.float32))
    )
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wide)


WEIGHTS = {
    "weight_norm": (
        lambda w: jaxnorm.weight_norm(w, SCALE),
        lambda w: weight_oracles.weight_norm(w, SCALE),
    ),
    "weight_standardization": (
        lambda w: jaxnorm.weight_standardization(w),
        lambda w: weight_oracles.weight_standardization(w),
    ),
    "scaled_weight_standardization": (
        lambda w: jaxnorm.scaled_weight_standardization(w, jaxnorm.ACTIVATION_GAINS["relu"]),
        lambda w: weight_oracles.scaled_weight_standardization(w, 1.7139588594),
    ),
    "spectral_norm": (
        lambda w: jaxnorm.spectral_norm(w, BIAS, n_steps=3)[0],
        lambda w: weight_oracles.spectral_norm(w, BIAS, n_steps=3)[0],
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(x64, name):
    ours, oracle = WEIGHTS[name]
    np.testing.assert_allclose(ours(KERNEL), oracle(KERNEL), rtol=1e-7, atol=1e-9)
    whole = np.rint(4 * KERNEL).astype(np.int8)
    assert ours(whole).dtype == np.float32
    np.testing.assert_array_equal(ours(whole), ours(whole.astype(np.float32)))


def test_stored_sigma_divides():
    w = jnp.asarray(KERNEL, jnp.float32)
    normalized, _, sigma = jaxnorm.spectral_norm(w, jnp.asarray(BIAS, jnp.float32))
    found = jaxnorm.spectral_norm_inference(w, sigma)
    np.testing.assert_allclose(found, normalized, rtol=1e-6)


def test_small_functions_mirror_each_other():
    """Whitened and coloured again is the input; training ends in what inference repeats."""
    seen = jaxnorm.comoments(X.astype(np.float32))
    stats = seen.stats()
    back = jaxnorm.color(jaxnorm.whiten(X.astype(np.float32), stats), stats)
    np.testing.assert_allclose(back, X, rtol=1e-4, atol=1e-4)
    y, _ = jaxnorm.batch_norm(X.astype(np.float32))
    evidence = jaxnorm.moments(X.astype(np.float32), axes=(0, 1, 2))
    again = jaxnorm.batch_norm_inference(X.astype(np.float32), evidence.stats())
    np.testing.assert_allclose(again, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", [n for n, value in vars(jaxnorm).items() if inspect.isfunction(value) and n[0] != "_"]
)
def test_every_argument_is_documented(name):
    function = getattr(jaxnorm, name)
    for parameter in inspect.signature(function).parameters:
        assert parameter in (function.__doc__ or ""), parameter
