"""Condition numbers, and what norms hand on."""

import jax
import numpy as np
import pytest


def test_eigenvalues_and_condition_number(example):
    """Of data with a covariance known by hand: variances 9, 4 and 1 along turned axes."""
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * 3)).reshape(3, -1).T
    turned = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    values = example.eigenvalues(signs * [3, 2, 1] @ turned + 7)
    np.testing.assert_allclose(values, [9, 4, 1])
    assert example.condition(values) == pytest.approx(9)
    # The smallest tenth does not count: here one of ten.
    assert example.condition(np.array([8.0] + [2.0] * 8 + [0.0])) == 4


@pytest.mark.usefixtures("quick_compile")
def test_what_norms_hand_on(example):
    """DBN hands on variance 1 in all directions; batch norm for single features only."""
    images = np.random.default_rng(0).normal(size=(64, 2, 2, 1)).astype(np.float32)
    images[:, 1] += images[:, 0]
    means = {}
    for kind in (example.Kind("batch norm"), example.Kind("DBN", 4)):
        network, optimizer = example.recipe(kind, 4, 1)
        state = example.create_state(network, 0, images, optimizer)
        (values,) = example.handed_on(network, state, images)
        means[kind.method] = values
    np.testing.assert_allclose(means["DBN"], 1, rtol=1e-2)
    np.testing.assert_allclose(means["batch norm"].sum(), 4, rtol=1e-3)
    assert means["batch norm"][0] > 1.2


def test_a_rate_is_set_without_another_optimizer(example):
    kind = example.Kind("batch norm")
    network, optimizer = example.recipe(kind, 4, 1)
    images = np.ones((2, 2, 2, 1), np.float32)
    state = example.create_state(network, 0, images, optimizer)
    ones = jax.tree.map(np.ones_like, state.params)
    for rate in (0.5, 2.0):
        after = example.at_rate(state, rate).apply_gradients(grads=ones)
        moved = state.params["Dense_0"]["kernel"] - after.params["Dense_0"]["kernel"]
        np.testing.assert_allclose(moved, rate, rtol=1e-6)


def test_the_best_rate_is_that_of_the_smallest_loss(example):
    def runs(*losses):
        return [example.Run(np.array([loss]), 0.0, 0.0, np.ones(1), 1.0) for loss in losses]

    by_rate = {0.1: runs(0.5, 0.6), 1.0: runs(0.2, 0.4), 9.0: runs(0.1, np.nan)}
    assert example.best(by_rate) == 1.0


def test_alike_up_to_a_tenth(example):
    assert example.alike([1.0, 2.0, 3.0], [1.0, 2.01, 2.99]) is True
    assert example.alike([0.5, 1.0, 1.6], [1.0, 2.0, 3.0]) is True  # less is not worse
    assert example.alike([1.5, 3.0, 4.6], [1.0, 2.0, 3.0]) is False
    assert example.alike([1.0, 9.0], [2.0, 2.0]) is None
    assert example.alike([1.0], [1.0]) is None
