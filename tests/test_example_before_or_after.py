"""Distances from a Gaussian, and what goes into the norms."""

import math

import numpy as np
import pytest
from scipy import stats


def test_distances_from_a_gaussian(example):
    count = 10_000
    ranks = (np.arange(count) + 0.5) / count
    gaussian = stats.norm.ppf(ranks)
    assert example.from_gaussian(example.shapes_of(7 + 3 * gaussian[:, None])) < 1e-3
    # Two points: the integral of |1 - x| over the upper half of a Gaussian, twice.
    two = np.repeat([-1.0, 1.0], count // 2)[:, None]
    expected = 4 * stats.norm.pdf(1) - 2 * stats.norm.pdf(0) + 4 * stats.norm.cdf(1) - 3
    assert example.from_gaussian(example.shapes_of(two)) == pytest.approx(expected, abs=1e-3)
    assert round(expected, 2) == 0.54  # as the docstring says
    # Uniform and exponential columns, against SciPy's distance; a constant one does not count.
    columns = np.stack([ranks, -np.log1p(-ranks), np.full(count, 3.0)], axis=1)
    shapes = example.shapes_of(columns)
    expected = np.mean([stats.wasserstein_distance(one, gaussian) for one in shapes.T[:2]])
    assert example.from_gaussian(shapes) == pytest.approx(expected, rel=1e-6)
    assert np.isnan(shapes[:, 2]).all()
    assert math.isnan(example.from_gaussian(shapes[:, 2:]))


def test_changes_ignore_mean_and_scale_but_not_shape(example):
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((500, 2)), rng.exponential(size=(500, 2))
    shapes, moved, other = map(example.shapes_of, (first, 5 * first - 2, second))
    assert example.change(shapes, moved) < 1e-12
    expected = np.mean(
        [stats.wasserstein_distance(*pair) for pair in zip(shapes.T, other.T, strict=True)]
    )
    assert example.change(shapes, other) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("place", ["before", "after"])
def test_what_goes_into_the_norms(example, place):
    """Against the two layers computed by hand."""
    data = example.images_of("digits", train=50, test=20)
    network = example.network_of("tanh", place, 2)
    state = example.create_dense_state(network, 0, data.train_images, 0.1)
    params = state.params
    x, expected = data.test_images.reshape(20, -1).astype(float), []
    for layer in range(2):
        dense = params[f"Dense_{layer}"]
        x = x @ np.asarray(dense["kernel"], float) + np.asarray(dense.get("bias", 0.0), float)
        x = np.tanh(x) if place == "after" else x
        expected.append(x)
        # Fresh running statistics: mean 0 and variance 1.
        x = x / np.sqrt(1 + 1e-5)
        x = np.tanh(x) if place == "before" else x
    found = example.norm_inputs(state, data.test_images)
    np.testing.assert_allclose(found, np.concatenate(expected, axis=1), atol=1e-5)


def test_the_best_rate_is_that_of_the_highest_mean(example):
    def course(*accuracies):
        return example.Course(np.array(accuracies), 0.0, 0.0, np.empty((1, 0)))

    slow, fast = (example.Kind("tanh", "after", rate) for rate in (0.1, 1.0))
    courses = {slow: [course(0.5, 0.9), course(0.5, 0.9)], fast: [course(0.8, 0.8)] * 2}
    assert list(example.best_of(courses)) == [fast]
    assert example.highest_rate(courses, "tanh", "after") == "none"
    courses[slow] = [course(0.9, 0.95)]
    assert example.highest_rate(courses, "tanh", "after") == "0.1"
