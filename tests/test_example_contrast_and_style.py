"""What instance norm takes away, and the looks of images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnorm import linen as jnn


@pytest.mark.parametrize("look", ["brighter", "red", "contrast x 1.5", "contrast x 0.2"])
def test_instance_norm_behind_a_convolution_takes_these_looks_away(example, look, x64):
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(2, 6, 6, 3))
    kernel = jnp.asarray(rng.normal(size=(3, 3, 3, 4)))

    def features(images):
        padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        y = jax.lax.conv_general_dilated(
            padded, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        layer = jnn.InstanceNorm(epsilon=0.0, use_scale=False, use_bias=False)
        return np.asarray(layer.apply({}, y))

    changed = example.LOOKS[look](images)
    assert np.abs(changed - images).max() > 0.1
    # Only as exact as the factors in float32: 0.2 is not the same there.
    np.testing.assert_allclose(features(changed), features(images), rtol=0, atol=1e-6)


def test_looks_by_hand(example):
    images = np.zeros((1, 2, 2, 3), np.float32)
    images[0, 0, 0] = 1.0
    np.testing.assert_allclose(
        example.contrast(images, 0.2)[0, :, :, 0], [[0.4, 0.2], [0.2, 0.2]], atol=1e-6
    )
    red = example.LOOKS["red"](images)
    np.testing.assert_allclose(red[0, 1, 1], [50 / 255, 0, 0], atol=1e-6)
    for look in ("colors", "stripes"):
        changed = example.LOOKS[look](np.repeat(images, 5, 0))
        assert changed.shape == (5, 2, 2, 3)
        assert changed.dtype == np.float32
        assert 0 <= changed.min() <= changed.max() <= 1
        assert np.abs(changed[0] - changed[1]).max() > 0.01  # each image has its own style
        np.testing.assert_array_equal(changed, example.LOOKS[look](np.repeat(images, 5, 0)))


@pytest.mark.usefixtures("quick_compile")
def test_all_networks_of_a_seed_begin_with_the_same_weights(example):
    drawn = example.drawn_weights(0, (2, 8, 8, 3))
    again, other = (example.drawn_weights(seed, (2, 8, 8, 3)) for seed in (0, 1))
    assert sorted(drawn) == [*(f"Conv_{number}" for number in range(5)), "Dense_0"]
    kernels = [weights["Conv_0"]["kernel"] for weights in (drawn, again, other)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert np.abs(kernels[0] - kernels[2]).max() > 0.01
