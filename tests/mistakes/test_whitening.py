"""Mistakes with whitening."""

import jax
import jax.numpy as jnp

import jaxnorm
from jaxnorm import JointStats, comoments
from mistakes import type_error, value_error, while_tracing
from mistakes.layers import linen_layer, zeros

X = zeros(4, 2, 6)


def joint_stats(groups=1, size=6):
    return JointStats(zeros(groups, size), zeros(groups, size, size))


def evidence(size=6):
    return comoments(zeros(4, size))


@while_tracing
def test_inputs():
    with type_error("decorrelated_batch_norm: … complex64[4, 2, 6] … [x.real, x.imag]"):
        jaxnorm.decorrelated_batch_norm(X + 0j)
    with value_error("iter_norm: axis=(1, 2) names 2 feature axes … reshape"):
        jaxnorm.iter_norm(X, axis=(1, 2))
    with value_error("decorrelated_batch_norm: … (4, 1, 6) … 6 features … mask.all(2, ke"):
        jaxnorm.decorrelated_batch_norm(X, where=jnp.ones((4, 1, 6), bool))

    with value_error("decorrelated_batch_norm: num_groups=1 and group_size=2 … num_groups=None"):
        jaxnorm.decorrelated_batch_norm(X, group_size=2)
    with value_error("DecorrelatedBatchNorm: num_groups=None and group_size=None … num_groups=1"):
        linen_layer("DecorrelatedBatchNorm", X, train=True, num_groups=None)
    for option, value in (("num_groups", 4), ("group_size", 0), ("num_groups", 1.5)):
        with value_error(f"comoments: 6 features … {option}={value} … one of [1, 2, 3, 6]"):
            comoments(X, **{"num_groups": None, option: value})


@while_tracing
def test_evidence_and_estimates():
    with value_error("merge_comoments: … found none … comoments(x)"):
        jaxnorm.merge_comoments()
    with value_error("merge_comoments: … (1, 2, 2), (1, 6, 6) … comoments(x)"):
        jaxnorm.merge_comoments(evidence(6), evidence(2))
    with type_error("pool_comoments: needs jaxnorm.Comoments, found JointStats … comoments(x)"):
        jaxnorm.pool_comoments(joint_stats(), 0)  # pyright: ignore[reportArgumentType]
    with type_error("decorrelated_batch_norm_inference: … found Comoments … comoments.stats()"):
        jaxnorm.decorrelated_batch_norm_inference(X, evidence())
    with value_error("whitening_matrix: … (6,) … (6, 6) … JointStats(mean[None], cov[None])"):
        jaxnorm.whitening_matrix(JointStats(zeros(6), zeros(6, 6)))
    with value_error("whiten: … 2 groups of 2 features … has 6 features along axis 2 … axis="):
        jaxnorm.whiten(X, joint_stats(2, 2))
    with value_error("update_running_covariance: … (1, 6, 6) … (2, 3, 3) … num_groups=2"):
        jaxnorm.update_running_covariance(joint_stats(2, 3), evidence())
    with type_error("update_running_covariance: needs jaxnorm.Comoments, found JointStats"):
        jaxnorm.update_running_covariance(joint_stats(), joint_stats())


@while_tracing
def test_dtypes_of_running_estimates():
    layer = jaxnorm.linen.DecorrelatedBatchNorm(use_running_average=False)
    variables = linen_layer("DecorrelatedBatchNorm", X, train=True)
    for dtype in ("float8_e4m3fn", "int32"):
        stored = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), variables)
        with type_error(f"DecorrelatedBatchNorm: … mean is stored as {dtype} … jnp.float32)"):
            layer.apply(
                variables | {"batch_stats": stored["batch_stats"]}, X, mutable=["batch_stats"]
            )


@while_tracing
def test_options():
    with value_error("coloring_matrix: kind='cholesky' … kind='zca' or kind='pca'"):
        jaxnorm.coloring_matrix(joint_stats(), kind="cholesky")
    with value_error("iter_norm: n_steps=0 … n_steps=5"):
        jaxnorm.iter_norm(X, n_steps=0)
    with type_error("IterNorm: n_steps=2.5 … integer … n_steps=5"):
        linen_layer("IterNorm", X, train=True, n_steps=2.5)
