"""Mistakes with the pure functions: statistics, evidence, estimates, parameters, numbers."""

import jax
import jax.numpy as jnp

import jaxnorm
from mistakes import name_error, refused, type_error, value_error, while_tracing
from mistakes.layers import ones, zeros

X = zeros(4, 2, 3)


def moments_of(*shape):
    return jaxnorm.moments(ones(2, *shape), axes=0)


def stats_of(*shape):
    return jaxnorm.Stats(zeros(*shape), ones(*shape))


def without_mean():
    return jaxnorm.moments(X, 0, use_mean=False)


@while_tracing
def test_shapes_of_statistics_and_parameters():
    with value_error("batch_norm_inference: … mean has shape (2,) … (4, 2, 3) … shape (3,)"):
        jaxnorm.batch_norm_inference(X, stats_of(2))
    with value_error("standardize: … variance has shape (2,) … 3 features along axis 2 … axes=..."):
        jaxnorm.standardize(X, jaxnorm.Stats(zeros(3), ones(2)), axes=(0, 1))
    with value_error("affine: … bias has shape (3,) … (2, 3) features along axes (1, 2)"):
        jaxnorm.affine(X, bias=ones(3), axis=(1, 2))
    with value_error("batch_norm: shift … (6,)"):
        jaxnorm.batch_norm(X, shift=zeros(6))
    with value_error("batch_norm_backward: … dy has shape (2, 3) … x has shape (4, 2, 3)"):
        jaxnorm.batch_norm_backward(X[0], X)

    with value_error("moments: … axes=-4 … 3 axes … from -3 to 2"):
        jaxnorm.moments(X, axes=(0, -4))
    with value_error("pool: … axes=1 … 1 axes … from -1 to 0"):
        jaxnorm.pool(moments_of(3), axes=1)


@while_tracing
def test_evidence_and_estimates():
    with type_error("merge: needs jaxnorm.Moments, found Stats … moments(x, axes"):
        jaxnorm.merge(stats_of(3))
    with type_error("pool: needs jaxnorm.Moments, found Stats"):
        jaxnorm.pool(stats_of(3), 0)
    with type_error("update_running: needs jaxnorm.Moments, found Stats … moments(x, axes)"):
        jaxnorm.update_running(stats_of(3), stats_of(3))
    with type_error("update_renorm: needs jaxnorm.Moments, found Stats"):
        jaxnorm.update_renorm(stats_of(3), stats_of(3))
    with type_error("batch_norm_inference: needs jaxnorm.Stats, found Moments … moments.stats()"):
        jaxnorm.batch_norm_inference(X, moments_of(3))
    with type_error("standardize: needs jaxnorm.Stats, found tuple"):
        jaxnorm.standardize(X, (zeros(3), ones(3)), axes=(0, 1))
    with type_error("bessel: needs jaxnorm.Stats, found Moments"):
        jaxnorm.bessel(moments_of(3), 4)
    with type_error("ema: needs jaxnorm.Stats, found Moments"):
        jaxnorm.ema(stats_of(3), moments_of(3), 0.9)
    with type_error("normalize: … Moments … Stats … jaxnorm.moments"):
        jaxnorm.normalize(X, axes=0, evidence=moments_of(3).stats())

    with value_error("merge: … found none … jaxnorm.moments(x, axes)"):
        jaxnorm.merge()
    with value_error("merge: … (2,), (3,) … jaxnorm.moments(x, axes)"):
        jaxnorm.merge(moments_of(3), moments_of(2))
    with value_error("merge: 1 of 2 parts are about the origin … use_mean=True"):
        jaxnorm.merge(jaxnorm.moments(X, 0), without_mean())


@while_tracing
def test_running_estimates():
    for option, options in (
        ("debias=True", {"debias": True}),
        ("momentum=None", {"momentum": None}),
    ):
        with value_error(f"update_running: … {option} … updates=jnp.zeros((3,))"):
            jaxnorm.update_running(stats_of(3), moments_of(3), **options)
    for old, new in ((3, 2), (3, 1), (1, 3)):
        with value_error(f"update_running: … ({new},) … ({old},)"):
            jaxnorm.update_running(stats_of(old), moments_of(new))
    with value_error("update_running: a count of updates of shape () … (3,) … jnp.zeros(features)"):
        jaxnorm.update_running(stats_of(3), moments_of(3), updates=jnp.int32(0))
    with value_error("update_running: … momentum=2 … from 0 to 1 … momentum=0.99"):
        jaxnorm.update_running(stats_of(3), moments_of(3), momentum=2)
    with value_error("ema: an estimate of shape (4, 3) … (3,)"):
        jaxnorm.ema(stats_of(3), stats_of(4, 3), 0.9)
    with value_error("ema: the old estimate has a mean and … mean=None … use_mean=True"):
        jaxnorm.ema(jaxnorm.moments(X, 0).stats(), without_mean().stats(), 0.9)
    with value_error("debiased_ema: momentum=1 … momentum=None"):
        jaxnorm.debiased_ema(stats_of(3), stats_of(3), 1.0, 0)


@while_tracing
def test_dtypes_of_running_estimates():
    for name, call in {
        "ema": lambda old: jaxnorm.ema(old, stats_of(3), 0.9),
        "debiased_ema": lambda old: jaxnorm.debiased_ema(old, stats_of(3), 0.9, 0),
        "cumulative_average": lambda old: jaxnorm.cumulative_average(old, stats_of(3), 0),
        "bessel": lambda old: jaxnorm.bessel(old, 4),
        "update_running": lambda old: jaxnorm.update_running(old, moments_of(3)),
        "update_renorm": lambda old: jaxnorm.update_renorm(old, moments_of(3)),
    }.items():
        for dtype in ("bfloat16", "float8_e4m3fn", "int32"):
            with type_error(f"{name}: the running mean is {dtype} … mean.astype(jnp.float32)"):
                call(jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), stats_of(3)))

    # Of inputs and parameters.
    with type_error("batch_norm: … float8_e4m3fn … x.astype(jnp.bfloat16)"):
        jaxnorm.batch_norm(X.astype(jnp.float8_e4m3fn))
    with type_error("layer_norm: scale is float8_e4m3fn[3] … scale.astype(jnp.float32)"):
        jaxnorm.layer_norm(X, jnp.ones(3, jnp.float8_e4m3fn))
    with type_error("merge: the variance is int32[3] … x.astype(jnp.float32)"):
        jaxnorm.merge(jax.tree.map(lambda leaf: leaf.astype(int), moments_of(3)))
    with type_error("batch_norm_backward_steps: … complex64 … jax.vjp"):
        jaxnorm.batch_norm_backward_steps(X + 0j, X + 0j)


@while_tracing
def test_epsilon():
    for epsilon in (None, "small"):
        with type_error("batch_norm: epsilon= … known when … epsilon=1e-5"):
            jaxnorm.batch_norm(X, epsilon=epsilon)
    with type_error("batch_norm: epsilon= … known when … traced"):
        jax.vmap(lambda epsilon: jaxnorm.batch_norm(X, epsilon=epsilon)[0])(jnp.ones(2))
    with type_error("layer_norm: epsilon='1e-5' … epsilon=1e-5"):
        jaxnorm.layer_norm(X, epsilon="1e-5")
    with value_error("batch_norm_backward: epsilon=-1.0 … 0 or more"):
        jaxnorm.batch_norm_backward(X, X, epsilon=-1.0)

    with refused(AttributeError, "module 'jaxnorm' … 'batchnorm'"):
        jaxnorm.batchnorm  # noqa: B018
    with name_error("switchable_norm: axis_name='batch' is not bound"):
        jaxnorm.switchable_norm(X, ones(3), ones(3), axis_name="batch")
