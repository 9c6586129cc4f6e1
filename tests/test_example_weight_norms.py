"""Starts from data, and what is read off losses."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict


@pytest.fixture
def images():
    return np.random.default_rng(0).normal(0.3, 0.5, (24, 8, 8, 1)).astype(np.float32)


def start(example, way, images):
    """A network with two convolutions, and its parameters."""
    network = example.Network(example.WAYS[way], 2)
    init = jax.jit(network.init, static_argnames="train")
    return network, init(jax.random.key(3), images, train=False)["params"]


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("way", ["plain, from data", "weight norm, from data"])
def test_from_data_every_feature_has_mean_0_and_deviation_1(example, images, way):
    network, params = start(example, way, images)
    params = example.from_data(network, params, images)
    outputs = example.outputs_of(network, params, images)
    assert list(outputs) == ["conv0", "conv1", "output"]
    for x in outputs.values():
        rows = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
        np.testing.assert_allclose(rows.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(rows.std(0), 1, rtol=1e-5)


@pytest.mark.usefixtures("quick_compile")
def test_from_data_weight_norm_moves_scales_and_biases_alone(example, images):
    network, before = start(example, "weight norm, from data", images)
    after = flatten_dict(example.from_data(network, before, images))
    for path, value in flatten_dict(before).items():
        same = bool((np.asarray(value) == np.asarray(after[path])).all())
        assert same == (path[-1] == "kernel"), path


@pytest.mark.usefixtures("quick_compile")
def test_keep_init_starts_as_the_plain_network(example, images):
    logits = [
        example.outputs_of(network, params, images)["output"]
        for network, params in (
            start(example, way, images) for way in (example.PLAIN, example.WEIGHT)
        )
    ]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)


def test_the_best_rate_has_the_least_loss_in_the_first_steps(example):
    # Over two seeds and two steps: 0.5 at the first rate, 0.4 at the second, whatever comes later.
    early = [np.array([0.7, 0.5, 0.0]), np.array([0.3, 0.5, 0.0])]
    late = [np.array([0.7, 0.3, 9.0]), np.array([0.1, 0.5, 9.0])]
    speeds = {
        (way, rate): [example.Trained(losses, 0.0) for losses in runs]
        for way in example.SPEED
        for rate, runs in ((0.1, early), (0.2, late))
    }
    assert example.best_rates(speeds, 2) == dict.fromkeys(example.SPEED, 0.2)
    assert example.best_rates(speeds, 3) == dict.fromkeys(example.SPEED, 0.1)
    assert example.mean_loss(speeds["plain", 0.1], 2) == pytest.approx([0.6, 0.4])


@pytest.mark.parametrize(
    ("first", "held"), [((2.0, 2.2, 2.1), True), ((4.0, 4.2, 4.1), False), ((1.0, 2.0, 6.0), None)]
)
def test_no_more_errors_means_less_than_half_a_point_above(example, first, held):
    losses = np.zeros(1)
    runs = [[example.Trained(losses, error) for error in some] for some in (first, (1.9, 2.1, 2.0))]
    assert example.no_more(*runs) is held
