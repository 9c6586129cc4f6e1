"""Averages without a start, and the population of networks side by side."""

import jax
import numpy as np
import pytest

from jaxnorm import linen as jnn


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
def test_averages_are_those_of_a_layer_that_has_no_start(example, momentum):
    """Against the layer's own, with `debias`; the example sees the batches by momentum 0."""
    batches = np.random.default_rng(0).normal(3, 2, (5, 16, 4)).astype(np.float32)
    own = jnn.BatchNorm(use_running_average=False, momentum=momentum, debias=True)
    last = jnn.BatchNorm(use_running_average=False, momentum=0.0)
    averages = example.Averages((0.9, momentum))
    variables = own.init(jax.random.key(0), batches[0])
    seen = last.init(jax.random.key(0), batches[0])
    for batch in batches:
        variables |= own.apply(variables, batch, mutable=["batch_stats"])[1]
        seen |= last.apply(seen, batch, mutable=["batch_stats"])[1]
        averages.follow(seen["batch_stats"])
    found = averages.each()[1]
    for name in ("mean", "var"):
        np.testing.assert_allclose(found[name], variables["batch_stats"][name], rtol=1e-5)


@pytest.mark.usefixtures("quick_compile")
def test_networks_side_by_side_get_the_statistics_of_their_own_images(example):
    """Of the first norm: against float64 numbers of the dense layer before it."""
    images = np.random.default_rng(0).random((40, 4, 4, 1)).astype(np.float32)
    snapshots = []
    for seed in (0, 1):
        optimizer = example.optimizer(0.1, 10)
        state = example.create_state(example.NETWORK, seed, images, optimizer)
        snapshots.append(example.Snapshot(seed, 1, state, []))
    for one, found in zip(snapshots, example.population(snapshots, images, 24, 8), strict=True):
        rows = np.random.default_rng(one.seed).permutation(40)[:24]
        kernel = np.asarray(one.state.params["Dense_0"]["kernel"], np.float64)
        x = images[rows].reshape(24, -1).astype(np.float64) @ kernel
        np.testing.assert_allclose(found["BatchNorm_0"]["mean"], x.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["BatchNorm_0"]["var"], x.var(0), rtol=1e-4, atol=1e-6)


def test_rises_and_agreement(example):
    errors = np.array([[50.0, 20.0, 35.0, 30.0], [9.0, 8.0, 7.0, 6.0]])
    assert example.largest_rise(errors).tolist() == [15.0, 0.0]
    five = np.array([3.0, 3.2, 2.9, 3.1, 3.0])
    assert example.agree(five, five) is True
    assert example.agree(five, five + 5) is False
    assert example.agree(np.array([1.0, 9.0]), np.array([4.0, 2.0])) is None
    assert example.agree(five[:1], five[:1]) is None
    assert example.less("", "", five, "", five + 1).held is True
    assert example.less("", "", five + 1, "", five).held is False
