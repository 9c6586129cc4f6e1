"""Mistakes with whitening."""

import jax
import jax.numpy as jnp
import numpy as np

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
from mistakes import type_error, value_error, while_tracing

X = np.zeros((4, 2, 6), np.float32)


def joint_stats(groups=1, size=6):
    return JointStats(jnp.zeros((groups, size)), jnp.zeros((groups, size, size)))


def evidence(size=6):
    return comoments(jnp.zeros((4, size)))


@while_tracing
def test_inputs():
    with type_error("decorrelated_batch_norm: … complex64[4, 2, 6] … [x.real, x.imag]"):
        decorrelated_batch_norm(X + 0j)
    with value_error("iter_norm: axis=(1, 2) names 2 feature axes … reshape"):
        iter_norm(X, axis=(1, 2))
    with value_error("decorrelated_batch_norm: … (4, 1, 6) … 6 features … mask.all(2, ke"):
        decorrelated_batch_norm(X, where=jnp.ones((4, 1, 6), bool))

    with value_error("decorrelated_batch_norm: num_groups=1 and group_size=2 … num_groups=None"):
        decorrelated_batch_norm(X, group_size=2)
    with value_error("DecorrelatedBatchNorm: num_groups=None and group_size=None … num_groups=1"):
        DecorrelatedBatchNorm(num_groups=None, use_running_average=False).init(jax.random.key(0), X)
    for option, value in (("num_groups", 4), ("group_size", 0), ("num_groups", 1.5)):
        with value_error(f"comoments: 6 features … {option}={value} … one of [1, 2, 3, 6]"):
            comoments(X, **{"num_groups": None, option: value})


@while_tracing
def test_evidence_and_estimates():
    with value_error("merge_comoments: … found none … comoments(x)"):
        merge_comoments()
    with value_error("merge_comoments: … (1, 2, 2), (1, 6, 6) … comoments(x)"):
        merge_comoments(evidence(6), evidence(2))
    with type_error("pool_comoments: needs jaxnorm.Comoments, found JointStats … comoments(x)"):
        pool_comoments(joint_stats(), 0)  # pyright: ignore[reportArgumentType]
    with type_error("decorrelated_batch_norm_inference: … found Comoments … comoments.stats()"):
        decorrelated_batch_norm_inference(X, evidence())
    with value_error("whitening_matrix: … (6,) … (6, 6) … JointStats(mean[None], cov[None])"):
        whitening_matrix(JointStats(jnp.zeros(6), jnp.zeros((6, 6))))
    with value_error("whiten: … 2 groups of 2 features … has 6 features along axis 2 … axis="):
        whiten(X, joint_stats(2, 2))
    with value_error("update_running_covariance: … (1, 6, 6) … (2, 3, 3) … num_groups=2"):
        update_running_covariance(joint_stats(2, 3), evidence())
    with type_error("update_running_covariance: needs jaxnorm.Comoments, found JointStats"):
        update_running_covariance(joint_stats(), joint_stats())


@while_tracing
def test_dtypes_of_running_estimates():
    layer = DecorrelatedBatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), X)
    for dtype in ("float8_e4m3fn", "int32"):
        stored = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), variables)
        with type_error(
            f"DecorrelatedBatchNorm: … mean is stored as {dtype} … .astype(jnp.float32)"
        ):
            layer.apply(
                variables | {"batch_stats": stored["batch_stats"]}, X, mutable=["batch_stats"]
            )


@while_tracing
def test_options():
    with value_error("coloring_matrix: kind='cholesky' … kind='zca' or kind='pca'"):
        coloring_matrix(joint_stats(), kind="cholesky")
    with value_error("iter_norm: n_steps=0 … n_steps=5"):
        iter_norm(X, n_steps=0)
    with type_error("IterNorm: n_steps=2.5 … integer … n_steps=5"):
        IterNorm(n_steps=2.5, use_running_average=False).init(jax.random.key(0), X)
