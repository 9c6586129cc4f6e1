"""Running statistics of instance norm: averages of the examples' own, as PyTorch keeps them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from modules import FRAMEWORKS, draw, draw_mask
from subjects import BOTH

import jaxnorm

SHAPE = (4, 3, 2, 5)


def layer_of(framework, x, **options):
    cls = getattr(jaxnorm, framework).InstanceNorm
    return FRAMEWORKS[framework](x, cls, track_running_stats=True, **options)


def averages(x, mask, ddof):
    """The mean over examples of their means and variances, for each feature, in float64."""
    valid = np.ones(SHAPE, bool) if mask is None else np.broadcast_to(mask, SHAPE)
    x = np.asarray(x, np.float64)
    means, variances = np.full((2, SHAPE[0], SHAPE[-1]), np.nan)
    for example, feature in np.ndindex(means.shape):
        values = x[example, ..., feature][valid[example, ..., feature]]
        if len(values) > ddof:
            means[example, feature] = values.mean()
            variances[example, feature] = values.var(ddof=ddof)
    return np.nanmean(means, 0), np.nanmean(variances, 0)


@pytest.mark.parametrize("ddof", [0, 1], ids=["biased", "unbiased"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@BOTH
def test_training_moves_the_averages_and_inference_uses_them(framework, masked, ddof):
    x = draw(SHAPE) + 10 * jnp.arange(4.0).reshape(4, 1, 1, 1)
    mask = draw_mask(SHAPE).at[1].set(False) if masked else None
    layer = layer_of(framework, x, momentum=0.75, running_var=["biased", "unbiased"][ddof])
    y, stats = jax.jit(layer.train)(layer.params, layer.stats, x, mask=mask)
    mean, var = averages(x, mask, ddof)
    np.testing.assert_allclose(stats["mean"], 0.25 * mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.75 + 0.25 * var, rtol=1e-5)

    untracked = jaxnorm.instance_norm(x, where=mask)[0]
    np.testing.assert_allclose(y, untracked, rtol=1e-5, atol=1e-5)
    z = layer.infer(layer.params, stats, x)
    expected = (np.asarray(x) - 0.25 * mean) / np.sqrt(0.75 + 0.25 * var + 1e-6)
    np.testing.assert_allclose(z, expected, rtol=1e-4, atol=1e-4)


@BOTH
def test_cumulative_averages_weigh_batches_alike(framework):
    batches = [draw(SHAPE, seed=seed) + seed for seed in range(3)]
    layer = layer_of(framework, batches[0], momentum=None)
    step, stats = jax.jit(layer.train), layer.stats
    for x in batches:
        _, stats = step(layer.params, stats, x)
    seen = np.array([averages(x, None, 0) for x in batches]).mean(0)
    np.testing.assert_allclose([stats["mean"], stats["var"]], seen, rtol=1e-5)
    np.testing.assert_array_equal(stats["updates"], np.full(5, 3))


@BOTH
def test_without_tracking_the_mode_says_nothing(framework):
    x = draw(SHAPE)
    cls = getattr(jaxnorm, framework).InstanceNorm
    layer = FRAMEWORKS[framework](x, cls)
    assert layer.stats == {}
    y, _ = layer.train(layer.params, {}, x)
    np.testing.assert_array_equal(y, layer.infer(layer.params, {}, x))
