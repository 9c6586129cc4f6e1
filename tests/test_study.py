"""What studies measure, on quadratics and linear networks, where the answers are known by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxnorm
from jaxnorm.diagnose import (
    covariate_shift,
    input_shift,
    jacobian_singular_values,
    loss_landscape,
    saturated_share,
)

RNG = np.random.default_rng(0)
CURVATURES = np.array([0.5, 2.0, 7.0])


def quadratic(params):
    x = params["x"]
    return 0.5 * (jnp.asarray(CURVATURES, x.dtype) @ x**2)


class TestLossLandscape:
    """On a quadratic, where gradients are linear."""

    START = np.array([1.0, -2.0, 0.3])
    SIZES = np.array([0.05, 0.2, 0.4])

    def oracle(self, direction):
        """Losses, distances of gradients and of parameters, in NumPy."""
        points = self.START + self.SIZES[:, None] * direction
        losses = 0.5 * (CURVATURES * points**2).sum(1)
        moved = self.SIZES[:, None] * direction
        return (
            losses,
            np.linalg.norm(CURVATURES * moved, axis=1),
            np.linalg.norm(moved, axis=1),
        )

    @pytest.mark.parametrize("given", [False, True], ids=["gradient", "direction"])
    def test_is_that_of_the_formulas(self, x64, given):
        direction = np.array([0.0, 1.0, -3.0]) if given else -CURVATURES * self.START
        found = loss_landscape(
            quadratic, {"x": self.START}, self.SIZES, {"x": direction} if given else None
        )
        losses, changes, distances = self.oracle(direction)
        np.testing.assert_allclose(found.losses, losses, rtol=1e-12)
        np.testing.assert_allclose(found.gradient_distances, changes, rtol=1e-12)
        np.testing.assert_allclose(found.distances, distances, rtol=1e-12)
        np.testing.assert_allclose(found.smoothness, (changes / distances).max(), rtol=1e-12)
        np.testing.assert_allclose(found.loss_range, np.ptp(losses), rtol=1e-12)
        np.testing.assert_allclose(found.loss, 0.5 * CURVATURES @ self.START**2, rtol=1e-12)
        norm = np.linalg.norm(CURVATURES * self.START)
        np.testing.assert_allclose(found.gradient_norm, norm, rtol=1e-12)

    def test_along_an_eigenvector_the_smoothness_is_its_eigenvalue(self, x64):
        for curvature, axis in zip(CURVATURES, np.eye(3), strict=True):
            found = loss_landscape(quadratic, {"x": self.START}, self.SIZES, {"x": axis})
            np.testing.assert_allclose(found.smoothness, curvature, rtol=1e-9)

    def test_a_start_that_does_not_move_does_not_count(self):
        found = loss_landscape(quadratic, {"x": jnp.ones(3)}, [0.0, 0.5])
        alone = loss_landscape(quadratic, {"x": jnp.ones(3)}, [0.5])
        assert found.losses[0] == found.loss
        assert found.gradient_distances[0] == 0
        np.testing.assert_allclose(found.smoothness, alone.smoothness, rtol=1e-6)
        assert jnp.isnan(loss_landscape(quadratic, {"x": jnp.ones(3)}, [0.0]).smoothness)

    def test_under_jit_and_vmap(self):
        starts = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)

        @jax.jit
        @jax.vmap
        def mapped(x):
            return loss_landscape(quadratic, {"x": x}, [0.1, 0.2])

        found = mapped(starts)
        assert found.losses.shape == (4, 2)
        each = [loss_landscape(quadratic, {"x": x}, [0.1, 0.2]) for x in starts]
        np.testing.assert_allclose(found.smoothness, [one.smoothness for one in each], rtol=1e-5)
        np.testing.assert_allclose(found.loss_range, [one.loss_range for one in each], rtol=1e-5)

    def test_points_keep_the_dtype_of_the_parameters(self):
        def loss_of(x):
            assert x.dtype == jnp.bfloat16
            return (x**2).sum()

        found = loss_landscape(loss_of, jnp.ones(3, jnp.bfloat16), [0.25])
        assert found.distances.dtype == jnp.float32
        np.testing.assert_allclose(found.smoothness, 2, rtol=1e-6)


SHAPES = {"a": (5, 4), "b": (3, 5), "c": (2, 3)}
BEFORE = {name: RNG.normal(size=shape) for name, shape in SHAPES.items()}
AFTER = {name: RNG.normal(size=shape) for name, shape in SHAPES.items()}


class TestCovariateShift:
    """On a linear network x -> C B A x with a quadratic loss, whose gradients are known."""

    LAYERS = ("a", "b", "c")
    DATA, TARGET = RNG.normal(size=(4, 10)), RNG.normal(size=(2, 10))

    def loss_of(self, params):
        y = params["c"]["w"] @ params["b"]["w"] @ params["a"]["w"] @ self.DATA
        return 0.5 * ((y - self.TARGET) ** 2).sum()

    def gradient(self, a, b, c):
        """By hand."""
        error = c @ b @ a @ self.DATA - self.TARGET
        return {
            "a": b.T @ c.T @ error @ self.DATA.T,
            "b": c.T @ error @ (a @ self.DATA).T,
            "c": error @ (b @ a @ self.DATA).T,
        }

    def found(self, function=covariate_shift):
        before, after = (
            {name: {"w": jnp.asarray(w)} for name, w in params.items()}
            for params in (BEFORE, AFTER)
        )
        return function(self.loss_of, before, after, self.LAYERS)

    def test_is_that_of_the_formulas(self, x64):
        found = self.found()
        old, new = ([one[name] for name in self.LAYERS] for one in (BEFORE, AFTER))
        first = self.gradient(*old)
        assert list(found) == list(self.LAYERS)
        for number, name in enumerate(self.LAYERS):
            second = self.gradient(*new[:number], *old[number:])[name]
            distance = np.linalg.norm(second - first[name])
            cosine = (second * first[name]).sum()
            cosine /= np.linalg.norm(second) * np.linalg.norm(first[name])
            np.testing.assert_allclose(found[name].distance, distance, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(found[name].cosine, cosine, rtol=1e-9)

    def test_of_the_first_layer_is_none(self):
        assert self.found()["a"].distance == 0

    def test_under_jit(self):
        jitted = jax.jit(covariate_shift, static_argnums=(0, 3))
        for name, shift in self.found(jitted).items():
            expected = self.found()[name]
            np.testing.assert_allclose(shift.distance, expected.distance, rtol=1e-5)
            np.testing.assert_allclose(shift.cosine, expected.cosine, rtol=1e-5)


class TestInputShift:
    """Against scipy, in float64."""

    @pytest.mark.parametrize("count", [40, 27], ids=["same count", "fewer"])
    def test_is_that_of_scipy(self, x64, count):
        before = RNG.normal(size=(8, 5, 3)) * [1, 2, 0.1] + [0, 50, 1]
        after = RNG.exponential(size=(count, 3)) * [1, 2, 0.3] + [0, 49, 1]
        found = input_shift(before, after)
        rows = before.reshape(-1, 3)
        std = rows.std(0)
        for k in range(3):
            expected = stats.wasserstein_distance(rows[:, k], after[:, k]) / std[k]
            np.testing.assert_allclose(found.wasserstein[k], expected, rtol=1e-9)
        change = (after.mean(0) - rows.mean(0)) / std
        np.testing.assert_allclose(found.mean_change, change, rtol=1e-9)
        np.testing.assert_allclose(found.std_ratio, after.std(0) / std, rtol=1e-9)

    def test_a_shift_is_a_distance_in_stds_and_units_do_not_count(self):
        x = RNG.normal(size=(100, 2)).astype(np.float32)
        moved = x + 0.5 * x.std(0)
        for unit in (1.0, 1000.0):
            found = input_shift(unit * x, unit * moved)
            np.testing.assert_allclose(found.wasserstein, 0.5, rtol=1e-4)
            np.testing.assert_allclose(found.mean_change, 0.5, rtol=1e-4)
            np.testing.assert_allclose(found.std_ratio, 1, rtol=1e-4)

    def test_the_order_of_values_does_not_count(self):
        x = RNG.normal(size=(50, 2)).astype(np.float32)
        assert input_shift(x, RNG.permutation(x)).wasserstein.max() < 1e-6

    def test_constant_features(self):
        zeros, both = jnp.zeros((4, 2)), jnp.zeros((4, 2)).at[:, 1].add(3)
        found = input_shift(zeros, both)
        assert found.mean_change.tolist() == [0, float("inf")]
        assert found.wasserstein.tolist() == [0, float("inf")]
        assert found.std_ratio.tolist() == [1, 1]

    @pytest.mark.parametrize(("value", "rows"), [(0.7, (60, 59)), (0.3, (777, 500))])
    def test_constants_that_no_mean_hits_exactly(self, value, rows):
        first, second = (jnp.full((number, 1), value, jnp.float32) for number in rows)
        found = input_shift(first, second)
        assert [leaf.item() for leaf in found] == [0, 1, 0]
        assert input_shift(first, second + 1).mean_change.item() == float("inf")

    def test_narrow_inputs_are_measured_in_float32(self):
        x = jnp.asarray(RNG.normal(size=(64, 2)), jnp.bfloat16)
        found = jax.jit(input_shift)(x, x * 2)
        assert found.wasserstein.dtype == jnp.float32
        np.testing.assert_allclose(found.std_ratio, 2, rtol=1e-5)


# The function, and its derivative relative to the largest one.
SLOPES = {
    "sigmoid": (jax.nn.sigmoid, lambda x: 4 / (2 + np.exp(x) + np.exp(-x))),
    "tanh": (jnp.tanh, lambda x: 1 / np.cosh(x) ** 2),
    "relu": (jax.nn.relu, lambda x: (x > 0).astype(float)),
}


class TestSaturatedShare:
    """Against derivatives by hand."""

    X = RNG.normal(size=(200, 3)).astype(np.float32) * [1, 4, 8] + [0, 0, 3]

    @pytest.mark.parametrize("threshold", [0.1, 0.5])
    @pytest.mark.parametrize("name", SLOPES)
    def test_is_that_of_the_derivative(self, name, threshold):
        activation, relative_slope = SLOPES[name]
        flat = relative_slope(self.X) < threshold
        x = jnp.asarray(self.X, jnp.float32)
        found = saturated_share(x, activation, threshold=threshold)
        np.testing.assert_allclose(found, flat.mean(), atol=1e-6)
        by_unit = saturated_share(x, activation, threshold=threshold, axes=0)
        np.testing.assert_allclose(by_unit, flat.mean(0), atol=1e-6)
        assert 0 < flat.mean() < 1

    def test_the_steepest_place_need_not_be_the_origin(self):
        """Softplus is steepest far out, at 1, and half as steep at the origin."""
        x = jnp.array([0.0, -3.0])
        assert saturated_share(x, jax.nn.softplus, threshold=0.49) == 0.5
        assert saturated_share(x, jax.nn.softplus, threshold=0.51) == 1


class TestJacobianSingularValues:
    """Of what is linear, and of a normalization."""

    def test_of_a_matrix(self, x64):
        matrix = RNG.normal(size=(3, 5))
        found = jacobian_singular_values(lambda x: jnp.asarray(matrix) @ x, np.ones(5))
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, np.linalg.svd(matrix)[1], rtol=1e-9)

    def test_where_the_jacobian_is_not_finite(self):
        assert np.isnan(jacobian_singular_values(jnp.sqrt, np.zeros(3))).tolist() == [True] * 3

    def test_of_a_nonlinear_function_at_a_point(self, x64):
        x = RNG.normal(size=(2, 3))
        found = jacobian_singular_values(jnp.tanh, x)
        expected = np.sort((1 - np.tanh(x) ** 2).ravel())[::-1]
        np.testing.assert_allclose(found, expected, rtol=1e-9)

    def test_layer_norm_removes_mean_and_scale_of_each_row(self, x64):
        x = RNG.normal(size=(2, 6))
        found = jacobian_singular_values(lambda x: jaxnorm.layer_norm(x, epsilon=0.0), x)
        expected = np.sort(np.concatenate([*(1 / x.std(1, keepdims=True).repeat(4, 1)), [0] * 4]))
        np.testing.assert_allclose(found, expected[::-1], rtol=1e-9, atol=1e-12)

    def test_of_bfloat16(self):
        found = jacobian_singular_values(lambda x: 2 * x, jnp.ones(3, jnp.bfloat16))
        assert found.tolist() == [2, 2, 2]
