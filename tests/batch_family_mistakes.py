"""Mistakes with batch renorm, AdaBN, switchable norm and IBN-Net: part of the table of errors."""

import jax.numpy as jnp
from flax import nnx
from mistakes import KEY, SHAPE, Row

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

X = jnp.zeros(SHAPE)
STATS = jaxnorm.Stats(jnp.zeros(3), jnp.ones(3))
DOMAINS = ("photos", "sketches")


def checkpoint(**options):
    """The variables of a `BatchNorm`."""
    return jaxnorm.linen.BatchNorm(use_running_average=False, **options).init(KEY, X)


def ada_bn(variables, frozen, **options):
    """A call for sketches of a layer that is given these variables."""
    jaxnorm.linen.AdaBN(domains=DOMAINS, **options).apply(
        variables, X, frozen, domain="sketches", mutable=["batch_stats"]
    )


def counting_in(dtype, **options):
    """A training call of a layer whose counts are stored in `dtype`."""
    layer = jaxnorm.linen.BatchNorm(use_running_average=False, **options)
    variables = layer.init(KEY, X)
    stats = variables["batch_stats"]
    counts = {"pending_batches": stats["pending_batches"].astype(dtype)}
    layer.apply({**variables, "batch_stats": stats | counts}, X, mutable=["batch_stats"])


def with_statistics():
    """The variables of a `BatchNorm`, and statistics of sketches without their count."""
    variables = dict(checkpoint())
    stats = variables["batch_stats"]
    of_sketches = {f"{name}_sketches": leaf for name, leaf in stats.items()}
    return variables | {"batch_stats": {**stats, **of_sketches}}


ROWS = [
    Row(
        "rmax below 1",
        lambda: jaxnorm.batch_renorm(X, STATS, rmax=0.5, dmax=0),
        ValueError,
        r"^batch_renorm: rmax=0\.5 must be 1 or more.*rmax=3\.0, dmax=5\.0",
    ),
    Row(
        "dmax below 0 of a layer",
        lambda: jaxnorm.nnx.BatchRenorm(3, dmax=-1.0, rngs=nnx.Rngs(0)),
        ValueError,
        r"^BatchRenorm\(num_features=3\): dmax=-1\.0 must be 0 or more",
    ),
    Row(
        "limit that is no number",
        lambda: jaxnorm.batch_renorm(X, STATS, rmax=3.0, dmax=float("nan")),
        ValueError,
        r"^batch_renorm: dmax=nan must be 0 or more",
    ),
    Row(
        "unbiased variance of batch renorm",
        lambda: jaxnorm.linen.BatchRenorm(running_var="unbiased").init(KEY, X, False),
        ValueError,
        r"^BatchRenorm: running_var='unbiased'.*running_var='biased'",
    ),
    Row(
        "running statistics of batch renorm for other features",
        lambda: jaxnorm.batch_renorm(
            X, jaxnorm.Stats(jnp.zeros(2), jnp.ones(2)), rmax=3.0, dmax=5.0
        ),
        ValueError,
        r"^batch_renorm: the mean has shape \(2,\).*3 features",
    ),
    Row(
        "estimate for evidence of batch renorm",
        lambda: jaxnorm.update_renorm(STATS, STATS),
        TypeError,
        r"^update_renorm: needs jaxnorm\.Moments, found Stats",
    ),
    Row(
        "a count of batches that cannot get so far",
        lambda: counting_in(jnp.bfloat16, update_every=300),
        ValueError,
        r"^BatchNorm: update_every=300 .*bfloat16.*to 256\..*pending_batches\.astype\(jnp\.float32",
    ),
    Row(
        "unknown domain of the function",
        lambda: jaxnorm.adabn(X, dict.fromkeys(DOMAINS, STATS), domain="films"),
        ValueError,
        r"^adabn: domain='films' is unknown.*'photos', 'sketches'.*domain='photos'",
    ),
    Row(
        "no domains of the function",
        lambda: jaxnorm.adabn(X, {}, domain="films"),
        ValueError,
        r"^adabn: domain='films' is unknown.*none.*jaxnorm\.Stats\(mean, var\)",
    ),
    *(
        Row(
            f"unknown domain of a layer, {name}",
            trigger,
            ValueError,
            rf"^{who}: domain='films' is unknown.*'photos', 'sketches'",
        )
        for name, who, trigger in (
            (
                "linen",
                "AdaBN",
                lambda: jaxnorm.linen.AdaBN(domains=DOMAINS).init(KEY, X, False, domain="films"),
            ),
            (
                "nnx",
                r"AdaBN\(num_features=3\)",
                lambda: jaxnorm.nnx.AdaBN(3, domains=DOMAINS, rngs=nnx.Rngs(0))(X, domain="films"),
            ),
        )
    ),
    *(
        Row(
            f"domains that are {what}",
            lambda domains=domains: jaxnorm.linen.AdaBN(domains=domains).init(KEY, X, False),
            ValueError,
            says,
        )
        for what, domains, says in (
            ("one word", "photos", r"^AdaBN: domains='photos'.*domains=\('source', 'target'\)"),
            ("none", (), r"^AdaBN: domains=\(\).*one name or more"),
            ("the same", ("a", "b", "a"), r"^AdaBN: domains=\('a', 'b', 'a'\).*=\('a', 'b'\)"),
        )
    ),
    Row(
        "inference of a domain that a checkpoint lacks",
        lambda: ada_bn(checkpoint(), True),
        ValueError,
        r"^AdaBN: 'batch_stats' has no 'mean_sketches'.*use_running_average=False, domain='sket",
    ),
    Row(
        "parameters of a domain that a checkpoint lacks",
        lambda: ada_bn(checkpoint(), False, separate_affine=True),
        ValueError,
        r"^AdaBN: 'params' has no 'scale_sketches'.*domain='sketches'.*copy of 'scale'",
    ),
    Row(
        "count of a domain that a checkpoint lacks",
        lambda: ada_bn(with_statistics(), False, momentum=None),
        ValueError,
        r"^AdaBN: .*'mean_sketches' but no 'updates_sketches'.*jnp\.full\(\(3,\), n, jnp\.float",
    ),
    Row(
        "two weights of switchable norm",
        lambda: jaxnorm.switchable_norm(X, jnp.ones(2), jnp.ones(3)),
        ValueError,
        r"^switchable_norm: mean_weight has shape \(2,\).*jnp\.ones\(3\)",
    ),
    Row(
        "axis of features and examples",
        lambda: jaxnorm.switchable_norm(X, jnp.ones(3), jnp.ones(3), batch_axis=-1),
        ValueError,
        r"^switchable_norm: axis 2.*both",
    ),
    Row(
        "unbound axis of switchable norm",
        lambda: jaxnorm.switchable_norm(X, jnp.ones(3), jnp.ones(3), axis_name="batch"),
        NameError,
        r"^switchable_norm: axis_name='batch' is not bound",
    ),
    Row(
        "several feature axes of IBN-a",
        lambda: jaxnorm.ibn_a(X, axis=(1, 2)),
        ValueError,
        r"^ibn_a: axis=\(1, 2\) names 2 feature axes",
    ),
    Row(
        "part without features",
        lambda: jaxnorm.linen.IBNa(ratio=0.1).init(KEY, X, False),
        ValueError,
        r"^IBNa: ratio=0\.1 of 3 features gives 0 to instance norm and 3.*ratio=0\.5",
    ),
    Row(
        "shortcut of another shape",
        lambda: jaxnorm.ibn_b(X, X[..., :1]),
        ValueError,
        r"^ibn_b: a shortcut of shape \(4, 2, 1\).*shape \(4, 2, 3\).*1 x 1 convolution",
    ),
]
