"""Mistakes with whitening. Part of the table of `test_errors.py`."""

import jax
import jax.numpy as jnp
from mistakes import KEY, Row

from jaxnorm.core.comoments import comoments
from jaxnorm.core.covariance import JointStats, merge_comoments, pool_comoments
from jaxnorm.core.running_covariance import update_running_covariance
from jaxnorm.linen.whitening import DecorrelatedBatchNorm, IterNorm
from jaxnorm.methods.decorrelated_batch_norm import (
    decorrelated_batch_norm,
    decorrelated_batch_norm_inference,
)
from jaxnorm.methods.iter_norm import iter_norm
from jaxnorm.methods.whitening import coloring_matrix, whiten, whitening_matrix

X = jnp.zeros((4, 2, 6))


def joint_stats(groups=1, size=6):
    return JointStats(jnp.zeros((groups, size)), jnp.zeros((groups, size, size)))


def evidence(size=6):
    return comoments(jnp.zeros((4, size)))


def trained_with_statistics_as(dtype):
    layer = DecorrelatedBatchNorm(use_running_average=False)
    variables = layer.init(KEY, X)
    stats = jax.tree.map(lambda leaf: leaf.astype(dtype), variables["batch_stats"])
    layer.apply({**variables, "batch_stats": stats}, X, mutable=["batch_stats"])


ROWS = [
    # Input
    Row(
        "covariance of complex numbers",
        lambda: decorrelated_batch_norm(X + 0j),
        TypeError,
        r"^decorrelated_batch_norm: .*complex64\[4, 2, 6\].*concatenate\(\[x\.real, x\.imag\]",
    ),
    Row(
        "several feature axes",
        lambda: iter_norm(X, axis=(1, 2)),
        ValueError,
        r"^iter_norm: axis=\(1, 2\) names 2 feature axes.*reshape",
    ),
    Row(
        "mask of single features",
        lambda: decorrelated_batch_norm(X, where=jnp.ones((4, 1, 6), bool)),
        ValueError,
        r"^decorrelated_batch_norm: .*shape \(4, 1, 6\).*6 features along axis 2.*mask\.all\(2, ke",
    ),
    # Groups
    Row(
        "groups given twice",
        lambda: decorrelated_batch_norm(X, group_size=2),
        ValueError,
        r"^decorrelated_batch_norm: num_groups=1 and group_size=2.*num_groups=None, group_size=",
    ),
    Row(
        "groups given by neither",
        lambda: DecorrelatedBatchNorm(num_groups=None).init(KEY, X, use_running_average=False),
        ValueError,
        r"^DecorrelatedBatchNorm: num_groups=None and group_size=None.*num_groups=1",
    ),
    *(
        Row(
            f"{option}={value} of 6 features",
            lambda option=option, value=value: comoments(X, **{"num_groups": None, option: value}),
            ValueError,
            rf"^comoments: 6 features.*{option}={value}.*one of \[1, 2, 3, 6\]",
        )
        for option, value in (("num_groups", 4), ("group_size", 0), ("num_groups", 1.5))
    ),
    # Evidence and estimates
    Row(
        "merge of nothing, jointly",
        lambda: merge_comoments(),
        ValueError,
        r"^merge_comoments: .*found none.*comoments\(x\)",
    ),
    Row(
        "merge of different features, jointly",
        lambda: merge_comoments(evidence(6), evidence(2)),
        ValueError,
        r"^merge_comoments: .*\(1, 2, 2\), \(1, 6, 6\).*comoments\(x\)",
    ),
    Row(
        "pool of an estimate, jointly",
        lambda: pool_comoments(joint_stats(), 0),  # pyright: ignore[reportArgumentType]
        TypeError,
        r"^pool_comoments: needs jaxnorm\.Comoments, found JointStats.*comoments\(x\)",
    ),
    Row(
        "evidence for a joint estimate",
        lambda: decorrelated_batch_norm_inference(X, evidence()),
        TypeError,
        r"^decorrelated_batch_norm_inference: .*JointStats, found Comoments.*comoments\.stats\(\)",
    ),
    Row(
        "covariance without groups",
        lambda: whitening_matrix(JointStats(jnp.zeros(6), jnp.zeros((6, 6)))),
        ValueError,
        r"^whitening_matrix: .*\(6,\).*\(6, 6\).*JointStats\(mean\[None\], cov\[None\]\)",
    ),
    Row(
        "covariance of other features",
        lambda: whiten(X, joint_stats(2, 2)),
        ValueError,
        r"^whiten: .*2 groups of 2 features.*\(4, 2, 6\) has 6 features along axis 2.*axis=",
    ),
    Row(
        "evidence for other groups than the running ones",
        lambda: update_running_covariance(joint_stats(2, 3), evidence()),
        ValueError,
        r"^update_running_covariance: .*\(1, 6, 6\).*\(2, 3, 3\).*num_groups=2",
    ),
    Row(
        "running estimate for evidence, jointly",
        lambda: update_running_covariance(joint_stats(), joint_stats()),
        TypeError,
        r"^update_running_covariance: needs jaxnorm\.Comoments, found JointStats",
    ),
    *(
        Row(
            f"running covariance stored in {dtype}",
            lambda dtype=dtype: trained_with_statistics_as(dtype),
            TypeError,
            rf"^DecorrelatedBatchNorm: .*mean is stored as {dtype}.*mean\.astype\(jnp\.float32\)",
        )
        for dtype in ("float8_e4m3fn", "int32")
    ),
    # Options
    Row(
        "unknown kind of whitening",
        lambda: coloring_matrix(joint_stats(), kind="cholesky"),
        ValueError,
        r"^coloring_matrix: kind='cholesky'.*kind='zca' or kind='pca'",
    ),
    Row(
        "no steps of Newton",
        lambda: iter_norm(X, n_steps=0),
        ValueError,
        r"^iter_norm: n_steps=0.*n_steps=5",
    ),
    Row(
        "half a step of Newton",
        lambda: IterNorm(n_steps=2.5).init(KEY, X, use_running_average=False),
        TypeError,
        r"^IterNorm: n_steps=2\.5.*integer.*n_steps=5",
    ),
]
