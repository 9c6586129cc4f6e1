"""Mistakes with what studies measure. Part of the table of `mistakes`."""

import jax.numpy as jnp
from mistakes import Row

from jaxnorm.diagnose import (
    covariate_shift,
    input_shift,
    jacobian_singular_values,
    loss_landscape,
    saturated_share,
)

X = jnp.zeros((4, 3))


def total(params):
    return sum(value.sum() for value in params.values())


ROWS = [
    Row(
        "landscape over parameters without gradient",
        lambda: loss_landscape(total, {"a": X, "count": jnp.int32(0)}, [0.1]),
        TypeError,
        r"^loss_landscape: params holds .*int32.*loss_of\(params, rest\)",
    ),
    Row(
        "landscape of a loss for each example",
        lambda: loss_landscape(lambda x: x.sum(1), X, [0.1]),
        ValueError,
        r"^loss_landscape: .*shape \(4,\).*\.mean\(\)",
    ),
    Row(
        "landscape of a loss with auxiliary results",
        lambda: loss_landscape(lambda x: (x.sum(), x), X, [0.1]),
        ValueError,
        r"^loss_landscape: loss_of returns \(.*losses_of\(params\)\[0\]",
    ),
    Row(
        "landscape without steps",
        lambda: loss_landscape(jnp.sum, X, []),
        ValueError,
        r"^loss_landscape: step_sizes has shape \(0,\).*step_sizes=\[0\.05, 0\.1, 0\.2\]",
    ),
    Row(
        "landscape along a direction of another shape",
        lambda: loss_landscape(jnp.sum, X, [0.1], X[0]),
        ValueError,
        r"^loss_landscape: direction has shapes \(3,\), params \(4, 3\).*jax\.tree\.map",
    ),
    Row(
        "covariate shift without a layer's name",
        lambda: covariate_shift(total, {"a": X, "b": X}, {"a": X, "b": X}, ["b"]),
        ValueError,
        r"^covariate_shift: layers names \['b'\].*\['a', 'b'\].*layers=\['a', 'b'\]",
    ),
    Row(
        "covariate shift between two networks",
        lambda: covariate_shift(total, {"a": X}, {"a": X[0]}, ["a"]),
        ValueError,
        r"^covariate_shift: after has shapes .*\(3,\).*\(4, 3\).*loss_of, params, new_params",
    ),
    Row(
        "input shift between layers",
        lambda: input_shift(X, X[:, :2]),
        ValueError,
        r"^input_shift: before has 3 features.*after 2.*jnp\.moveaxis\(x, 1, -1\)",
    ),
    Row(
        "input shift of nothing",
        lambda: input_shift(X[:0], X),
        ValueError,
        r"^input_shift: found shape \(0, 3\).*x\[:, None\]",
    ),
    Row(
        "input shift of complex numbers",
        lambda: input_shift(X + 0j, X),
        TypeError,
        r"^input_shift: found complex64\[4, 3\].*x\.real",
    ),
    Row(
        "a threshold of saturation of 1",
        lambda: saturated_share(X, jnp.tanh, threshold=1.0),
        ValueError,
        r"^saturated_share: threshold=1\.0.*between 0 and 1.*threshold=0\.1",
    ),
    Row(
        "saturation of what is no activation",
        lambda: saturated_share(X, lambda x: x[None]),
        ValueError,
        r"^saturated_share: .*turns one number into .*1.*activation=jax\.nn\.sigmoid",
    ),
    Row(
        "singular values of a function with two results",
        lambda: jacobian_singular_values(lambda x: (x, x), X),
        ValueError,
        r"^jacobian_singular_values: the function returns \(.*function\(x\)\[0\]",
    ),
    Row(
        "singular values of a large function",
        lambda: jacobian_singular_values(jnp.sin, jnp.zeros((100, 100))),
        ValueError,
        r"^jacobian_singular_values: .*10000 x 10000.*limit of 20000000.*x\[:8\]",
    ),
    Row(
        "saturation of nothing",
        lambda: saturated_share(X[:0], jnp.tanh),
        ValueError,
        r"^saturated_share: inputs of shape \(0, 3\) hold nothing.*inputs=x @ kernel",
    ),
    Row(
        "saturation by a function without a steepest slope",
        lambda: saturated_share(X, jnp.sqrt),
        ValueError,
        r"^saturated_share: the largest slope .* is (nan|inf).*activation=jax\.nn\.sigmoid",
    ),
    Row(
        "saturation along an axis that is not there",
        lambda: saturated_share(X, jnp.tanh, axes=2),
        ValueError,
        r"^saturated_share: .*axes.*2",
    ),
]
