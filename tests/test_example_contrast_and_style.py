"""The reproduction of instance norm and IBN under other looks, in its quick form."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import image

from jaxnorm import linen as jnn

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    import contrast_and_style

    yield contrast_and_style
    sys.path.remove(str(EXAMPLES))


@pytest.mark.usefixtures("quick_compile")
def test_instance_norm_does_not_see_contrast_and_batch_norm_does(example, tmp_path):
    out = tmp_path / "picture.png"
    options = example.Options(quick=True, data="digits", steps=12, out=out)
    report = example.main(options)
    by_name = {row[0]: dict(zip(example.NORMS, row[1:], strict=True)) for row in report.rows}
    assert len(by_name) == len(example.LOOKS) + 2
    for norm in ("instance norm", "IBN-b"):
        same = {by_name[look][norm] for look in ("as trained", *example.AFFINE)}
        assert max(map(float, same)) - min(map(float, same)) <= 0.5  # one or two of 450 images
    moved = {norm: float(found) for norm, found in list(by_name.values())[-1].items()}
    assert moved["instance norm"] < 2 < 20 < moved["batch norm"]
    assert report.findings[0].held
    assert all(finding.held is None for finding in report.findings[1:])  # a single seed
    pixels = image.imread(out)
    assert pixels.shape[1] > 1000
    assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 50


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps and --test-images must be at least 1"),
        ({"batch_size": 500}, "--batch-size must be from 2 to"),
        ({"seeds": ()}, "--seeds must be numbers from 0 on"),
        ({"out": Path("picture.txt")}, "--out must end in"),
    ],
)
def test_impossible_options_are_refused(example, change, message):
    # By the class of the module at hand: other tests may have loaded their own copy.
    with pytest.raises(example.UsageError, match=message):
        example.main(example.Options(**{"data": "digits", "quick": True, **change}))
