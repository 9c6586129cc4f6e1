"""Mistakes with the options of one method each, and with the layers of one framework."""

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import jaxnorm
from mistakes import type_error, value_error, while_tracing
from mistakes.layers import linen_layer, nnx_layer, ones, zeros

X = zeros(4, 2, 6)
DOMAINS = ("photos", "sketches")
WEIGHTS = ones(3)


class Plain(nn.Module):
    """A model without norms."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


def stats_of(features=6):
    return jaxnorm.Stats(zeros(features), ones(features))


def train_linen(variables, name="BatchNorm", **options):
    """A training call of a layer that is given these variables."""
    layer = getattr(jaxnorm.linen, name)(use_running_average=False, **options)
    layer.apply(variables, X, mutable=["batch_stats"])


@while_tracing
def test_group_and_instance_norm():
    for who, call in (
        ("group_norm", lambda **options: jaxnorm.group_norm(X, **options)),
        ("GroupNorm", lambda **options: linen_layer("GroupNorm", X, **options)),
        ("GroupNorm(num_features=6)", lambda **options: nnx_layer("GroupNorm", 6, **options)(X)),
    ):
        with value_error(f"{who}: 6 features … num_groups=4 … divisor"):
            call(num_groups=4)
        with value_error(f"{who}: 6 features … num_groups=0 … [1, 2, 3, 6]"):
            call(num_groups=0)
        with value_error(f"{who}: 6 features … group_size=5 … [1, 2, 3, 6]"):
            call(num_groups=None, group_size=5)
        with value_error(f"{who}: num_groups=2 and group_size=3 … num_groups=None"):
            call(num_groups=2, group_size=3)
        with value_error(f"{who}: num_groups=None and group_size=None"):
            call(num_groups=None)
    with value_error("GroupNorm: reduction_axes=(1,) must include the feature axis 2 … (1, 2)"):
        linen_layer("GroupNorm", X, num_groups=2, reduction_axes=1)

    with value_error("instance_norm: axis 0 … (4, 2, 6) … batch_axis"):
        jaxnorm.instance_norm(X, axis=0)
    with value_error("InstanceNorm: feature_axes=(0, 2) … 3 axes … feature_axes=-1"):
        linen_layer("InstanceNorm", X, feature_axes=(0, 2))
    with value_error("InstanceNorm: use_running_average is missing"):
        linen_layer("InstanceNorm", X, track_running_stats=True)
    with value_error("InstanceNorm: feature_axes=-1 … 1 axes … x[None]."):
        linen_layer("InstanceNorm", X[0, 0])
    with value_error("InstanceNorm(num_features=6): update_every=4 … track_running_stats=True"):
        nnx_layer("InstanceNorm", 6, update_every=4)


@while_tracing
def test_layer_norm():
    with value_error("LayerNorm: reduction_axes=3 … 3 axes"):
        linen_layer("LayerNorm", X, reduction_axes=3)
    with value_error("LayerNorm(num_features=5): … num_features=(2, 6) … feature_axes"):
        nnx_layer("LayerNorm", 5, feature_axes=(1, 2))(X)
    for kind, value in (("NoneType", None), ("str", "x"), ("list", [[1.0], [2.0, 3.0]])):
        with type_error(f"LayerNorm: the input is {kind}, which is no array … Pass an array"):
            linen_layer("LayerNorm", value)
    with type_error("RMSNorm(num_features=6): bias_metadata={'a': 1} … no bias … Drop"):
        nnx_layer("RMSNorm", 6, bias_metadata={"a": 1})


@while_tracing
def test_batch_norm():
    # No part of a model, so that it has no path.
    with value_error("BatchNorm: … use_running_average"):
        linen_layer("BatchNorm", X)
    with type_error("BatchNorm: takes num_features as positional arguments, found 2 … rngs=rngs"):
        jaxnorm.nnx.BatchNorm(3, nnx.Rngs(0))
    with type_error("BatchNorm(num_features=6): momentum='a' must be a number … momentum=0.99"):
        nnx_layer("BatchNorm", 6, momentum="a")
    checkpoint = linen_layer("BatchNorm", X, train=True)
    with value_error("BatchNorm: … debias=True … no 'updates' … jnp.full((6,), n, jnp.float32)"):
        train_linen(checkpoint, debias=True)
    counting = linen_layer("BatchNorm", X, train=True, update_every=300)
    pending = counting["batch_stats"]["pending_batches"].astype(jnp.bfloat16)
    counting["batch_stats"] |= {"pending_batches": pending}
    with value_error("BatchNorm: update_every=300 … bfloat16 … to 256. … .astype(jnp.float32"):
        train_linen(counting, update_every=300)


@while_tracing
def test_batch_renorm():
    with value_error("batch_renorm: rmax=0.5 must be 1 or more … rmax=3.0, dmax=5.0"):
        jaxnorm.batch_renorm(X, stats_of(), rmax=0.5, dmax=0)
    with value_error("batch_renorm: dmax=nan must be 0 or more"):
        jaxnorm.batch_renorm(X, stats_of(), rmax=3.0, dmax=float("nan"))
    with value_error("BatchRenorm(num_features=3): dmax=-1.0 must be 0 or more"):
        nnx_layer("BatchRenorm", 3, dmax=-1.0)
    with type_error("BatchRenorm: rmax='3' must be a number … rmax=3.0"):
        linen_layer("BatchRenorm", X, train=True, rmax="3")
    with value_error("BatchRenorm: running_var='unbiased' … running_var='biased'"):
        linen_layer("BatchRenorm", X, train=True, running_var="unbiased")
    with value_error("batch_renorm: the mean has shape (2,) … 6 features"):
        jaxnorm.batch_renorm(X, stats_of(2), rmax=3.0, dmax=5.0)


@while_tracing
def test_adabn():
    with value_error("adabn: domain='films' is unknown … 'photos', 'sketches' … domain='photos'"):
        jaxnorm.adabn(X, dict.fromkeys(DOMAINS, stats_of()), domain="films")
    with value_error("adabn: domain='films' is unknown … none … jaxnorm.Stats(mean, var)"):
        jaxnorm.adabn(X, {}, domain="films")
    with type_error("adabn: needs … each domain … found Stats … {'b': jaxnorm.Stats"):
        jaxnorm.adabn(X, stats_of(), domain="b")
    with value_error("AdaBN: domain='films' is unknown … 'photos', 'sketches'"):
        linen_layer("AdaBN", X, train=True, call={"domain": "films"}, domains=DOMAINS)
    with value_error("AdaBN(num_features=6): domain='films' is unknown … 'photos', 'sketches'"):
        nnx_layer("AdaBN", 6, domains=DOMAINS)(X, domain="films")
    with type_error("AdaBN(num_features=6): use_running_average='b' must be … domain='b'"):
        nnx_layer("AdaBN", 6, domains=("a", "b"))(X, "b")
    for domains, says in (
        ("photos", "domains='photos' … domains=('source', 'target')"),
        ((), "domains=() … one name or more"),
        (("a", "b", "a"), "domains=('a', 'b', 'a') … =('a', 'b')"),
    ):
        with value_error(f"AdaBN: {says}"):
            linen_layer("AdaBN", X, domains=domains, train=True)


@while_tracing
def test_adabn_of_a_checkpoint_without_the_domain():
    def sketches(variables, train=True, **options):
        layer = jaxnorm.linen.AdaBN(domains=DOMAINS, **options)
        layer.apply(variables, X, not train, domain="sketches", mutable=["batch_stats"])

    checkpoint = linen_layer("BatchNorm", X, train=True)
    with value_error("AdaBN: 'batch_stats' has no 'mean_sketches' … average=False, domain='sket"):
        sketches(checkpoint, train=False)
    with value_error("AdaBN: 'params' has no 'scale_sketches' … 'sketches' … copy of 'scale'"):
        sketches(checkpoint, separate_affine=True)
    # Statistics of sketches, but not their count.
    stats = checkpoint["batch_stats"]
    stats = stats | {f"{name}_sketches": leaf for name, leaf in stats.items()}
    with value_error("AdaBN: … 'mean_sketches' but no 'updates_sketches' … jnp.full((6,), n"):
        sketches(checkpoint | {"batch_stats": stats}, momentum=None)


@while_tracing
def test_switchable_norm_and_ibn():
    with value_error("switchable_norm: mean_weight has shape (2,) … jnp.ones(3)"):
        jaxnorm.switchable_norm(X, WEIGHTS[:2], WEIGHTS)
    with value_error("switchable_norm: axis 2 … both"):
        jaxnorm.switchable_norm(X, WEIGHTS, WEIGHTS, batch_axis=-1)
    with value_error("ibn_a: axis=(1, 2) names 2 feature axes"):
        jaxnorm.ibn_a(X, axis=(1, 2))
    with value_error("IBNa: ratio=0.05 of 6 features gives 0 to instance norm and 6 … ratio=0.5"):
        linen_layer("IBNa", X, train=True, ratio=0.05)
    with value_error("ibn_b: a shortcut of shape (4, 2, 1) … shape (4, 2, 6) … 1 x 1 convolution"):
        jaxnorm.ibn_b(X, X[..., :1])


@while_tracing
def test_citations():
    with value_error("cite: no method is called 'NoSuchNorm' … BatchNorm"):
        jaxnorm.cite("NoSuchNorm")
    with value_error("cite: found none … 0 arguments"):
        jaxnorm.cite()
    with value_error("cite: the layers of Plain … inputs=(x,)"):
        jaxnorm.cite(Plain())
    with value_error("cite: found none"):
        jaxnorm.cite(Plain(), inputs=(X,))
