"""Deviations by the formula, rates and scales, and what is read off curves."""

import numpy as np
import pytest


def float64_layer(weights, inputs, flowing, epsilon):
    """Batch norm of a dense layer, and its gradients by inputs and weights, by the formula."""
    x = inputs @ weights
    root = np.sqrt(x.var(0) + epsilon)
    y = (x - x.mean(0)) / root
    through = (flowing - flowing.mean(0) - y * (flowing * y).mean(0)) / root
    return y, through @ weights.T, inputs.T @ through


@pytest.mark.parametrize(("scale", "epsilon"), [(0.01, 0.1), (0.3, 10.0), (3.0, 1.0)])
def test_deviations_are_those_of_the_formula(example, scale, epsilon):
    drawn = np.random.default_rng(0).standard_normal((3, 100, 100), "f4").astype(float)
    inputs, weights, flowing = drawn[0][:60], drawn[1], drawn[2][:60]
    usual = float64_layer(weights, inputs, flowing, epsilon)
    scaled = float64_layer(scale * weights, inputs, flowing, epsilon)
    pairs = zip((scaled[0], scaled[1], scale * scaled[2]), usual, strict=True)
    expected = [np.abs(one - other).max() / np.abs(other).max() for one, other in pairs]
    np.testing.assert_allclose(example.deviations(scale, epsilon), expected, rtol=1e-3)


@pytest.mark.parametrize("scale", [0.01, 1.7, 300.0])
def test_the_law_is_exact_without_epsilon_only(example, scale):
    assert max(example.deviations(scale, 0.0)) < 1e-5
    assert max(example.deviations(0.01, 1.0)) > 0.1


def test_scale_and_rate_reach_what_they_should(example):
    data = example.images_of("digits", train=10)
    usual = example.initial_state(example.Kind("ReLU", True, "scales", 1.0), 0, data)
    kind = example.Kind("ReLU", True, "scales", 0.3, scale=10.0)
    scaled = example.initial_state(kind, 0, data)
    for name, layer in usual.params.items():
        factor = 10.0 if "hidden" in name else 1.0
        for key, values in layer.items():
            expected = factor * values if key == "kernel" else values
            np.testing.assert_allclose(scaled.params[name][key], expected, rtol=1e-6)
    # A step down gradients of one changes all parameters by the rate.
    ones = {
        name: {key: 1.0 + 0 * one for key, one in layer.items()}
        for name, layer in scaled.params.items()
    }
    stepped = scaled.apply_gradients(grads=ones)
    difference = scaled.params["output"]["bias"] - stepped.params["output"]["bias"]
    np.testing.assert_allclose(difference, 0.3, rtol=1e-6)


def test_survival_steps_and_highest_rates(example):
    curves = {
        example.Kind("ReLU", True, "rates", 0.1): [np.array([0.5, 0.95]), np.array([0.95, 0.8])],
        example.Kind("ReLU", True, "rates", 1.0): [np.array([0.2, 0.91]), np.array([0.1, 0.1])],
    }
    slow, fast = curves
    assert example.survivals(curves, [slow, fast]).tolist() == [[True, False], [True, False]]
    assert example.reached(curves, "ReLU", True) == pytest.approx([0.0, -1.0])
    assert example.highest_of(curves, "ReLU", True) == "0.32 (1 seeds had none)"
    assert example.best_rate(curves, "ReLU", True) == 0.1
    assert example.looks_to(curves, slow, [0.9, 0.9]) == [50.0, 25.0]
    assert example.looks_to(curves, fast, [0.9, 0.9]) == [50.0, 50.0]  # the second never
