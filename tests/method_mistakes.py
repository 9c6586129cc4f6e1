"""Mistakes with the options of one method each. Part of the table of `test_errors.py`."""

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from mistakes import KEY, Row

import jaxnorm

X = jnp.zeros((4, 2, 6))


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


def nnx_layer(name, *arguments, **options):
    return getattr(jaxnorm.nnx, name)(*arguments, rngs=nnx.Rngs(0), **options)


MISTAKES_WITH_METHODS = [
    *(
        Row(
            f"{say}, {who}",
            lambda call=call, options=options: call(**options),
            ValueError,
            rf"^{who}: {says}",
        )
        for who, call in (
            ("group_norm", lambda **o: jaxnorm.group_norm(X, **o)),
            ("GroupNorm", lambda **o: jaxnorm.linen.GroupNorm(**o).init(KEY, X)),
            (r"GroupNorm\(num_features=6\)", lambda **o: nnx_layer("GroupNorm", 6, **o)(X)),
        )
        for say, options, says in (
            ("groups that do not divide", {"num_groups": 4}, r"6 features.*num_groups=4.*divisor"),
            ("no groups", {"num_groups": 0}, r"6 features.*num_groups=0.*\[1, 2, 3, 6\]"),
            (
                "size that does not divide",
                {"num_groups": None, "group_size": 5},
                r"6 features.*group_size=5.*\[1, 2, 3, 6\]",
            ),
            (
                "groups and size",
                {"num_groups": 2, "group_size": 3},
                r"num_groups=2 and group_size=3.*num_groups=None",
            ),
            (
                "neither groups nor size",
                {"num_groups": None},
                r"num_groups=None and group_size=None",
            ),
        )
    ),
    Row(
        "groups without their axis",
        lambda: jaxnorm.linen.GroupNorm(num_groups=2, reduction_axes=1).init(KEY, X),
        ValueError,
        r"^GroupNorm: reduction_axes=\(1,\) must include the feature axis 2.*\(1, 2\)",
    ),
    Row(
        "instances along the feature axis",
        lambda: jaxnorm.instance_norm(X, axis=0),
        ValueError,
        r"^instance_norm: axis 0 .*\(4, 2, 6\).*batch_axis",
    ),
    Row(
        "features along the first axis",
        lambda: jaxnorm.linen.InstanceNorm(feature_axes=(0, 2)).init(KEY, X),
        ValueError,
        r"^InstanceNorm: feature_axes=\(0, 2\).*3 axes.*feature_axes=-1",
    ),
    Row(
        "tracked instances without a mode",
        lambda: jaxnorm.linen.InstanceNorm(track_running_stats=True).init(KEY, X),
        ValueError,
        r"^InstanceNorm: use_running_average is missing",
    ),
    Row(
        "axes of layer norm",
        lambda: jaxnorm.linen.LayerNorm(reduction_axes=3).init(KEY, X),
        ValueError,
        r"^LayerNorm: reduction_axes=3.*3 axes",
    ),
    Row(
        "merge of evidence with and without a mean",
        lambda: jaxnorm.merge(jaxnorm.moments(X, 0), jaxnorm.moments(X, 0, use_mean=False)),
        ValueError,
        r"^merge: 1 of 2 parts are about the origin.*use_mean=True",
    ),
    Row(
        "average of estimates with and without a mean",
        lambda: jaxnorm.ema(
            jaxnorm.moments(X, 0).stats(), jaxnorm.moments(X, 0, use_mean=False).stats(), 0.9
        ),
        ValueError,
        r"^ema: the old estimate has a mean and.*mean=None.*use_mean=True",
    ),
    Row(
        "shift of another shape",
        lambda: jaxnorm.batch_norm(X, shift=jnp.zeros(3)),
        ValueError,
        r"^batch_norm: shift.*\(3,\)",
    ),
    Row(
        "estimate for evidence",
        lambda: jaxnorm.normalize(X, axes=0, evidence=jaxnorm.moments(X, 0).stats()),
        TypeError,
        r"^normalize: .*Moments.*Stats.*jaxnorm\.moments",
    ),
    Row(
        "domain by position",
        lambda: nnx_layer("AdaBN", 6, domains=("a", "b"))(X, "b"),
        TypeError,
        r"^AdaBN\(num_features=6\): use_running_average='b' must be.*domain='b'",
    ),
    Row(
        "statistics of no domain",
        lambda: jaxnorm.adabn(X, jaxnorm.moments(X, (0, 1)).stats(), domain="b"),
        TypeError,
        r"^adabn: needs the statistics of each domain.*found Stats.*\{'b': jaxnorm\.Stats",
    ),
    Row(
        "limit that is text",
        lambda: jaxnorm.linen.BatchRenorm(rmax="3", use_running_average=False).init(KEY, X),
        TypeError,
        r"^BatchRenorm: rmax='3' must be a number.*rmax=3\.0",
    ),
    Row(
        "steps that are no integer",
        lambda: jaxnorm.linen.SpectralNorm(nn.Dense(3), n_steps=1.5).init(
            KEY, X, update_stats=True
        ),
        TypeError,
        r"^SpectralNorm: n_steps=1\.5 must be an integer.*n_steps=1",
    ),
    *(
        Row(
            f"input that is {kind}",
            lambda value=value: jaxnorm.linen.LayerNorm().init(KEY, value),
            TypeError,
            rf"^LayerNorm: the input is {kind}, which is no array.*Pass an array",
        )
        for kind, value in (("NoneType", None), ("str", "x"), ("list", [[1.0], [2.0, 3.0]]))
    ),
    Row(
        "momentum that is text",
        lambda: nnx_layer("BatchNorm", 6, momentum="a"),
        TypeError,
        r"^BatchNorm\(num_features=6\): momentum='a' must be a number.*momentum=0\.99",
    ),
    Row(
        "accumulation for statistics that there are not",
        lambda: nnx_layer("InstanceNorm", 6, update_every=4),
        ValueError,
        r"^InstanceNorm\(num_features=6\): update_every=4.*are none.*track_running_stats=True",
    ),
    Row(
        "epsilon that is a number in text",
        lambda: jaxnorm.layer_norm(X, epsilon="1e-5"),
        TypeError,
        r"^layer_norm: epsilon='1e-5'.*epsilon=1e-5",
    ),
    Row(
        "metadata of a bias that there is not",
        lambda: nnx_layer("RMSNorm", 6, bias_metadata={"a": 1}),
        TypeError,
        r"^RMSNorm\(num_features=6\): bias_metadata=\{'a': 1\}.*no bias.*Drop",
    ),
    Row(
        "features of layer norm",
        lambda: nnx_layer("LayerNorm", 5, feature_axes=(1, 2))(X),
        ValueError,
        r"^LayerNorm\(num_features=5\): .*\(2, 6\) features.*num_features=\(2, 6\).*feature_axes",
    ),
    Row(
        "instances without a batch",
        lambda: jaxnorm.linen.InstanceNorm().init(KEY, X[0, 0]),
        ValueError,
        r"^InstanceNorm: feature_axes=-1 .* 1 axes.*x\[None\]\.$",
    ),
    Row(
        "citation of an unknown name",
        lambda: jaxnorm.cite("NoSuchNorm"),
        ValueError,
        r"^cite: no method is called 'NoSuchNorm'.*BatchNorm",
    ),
    Row(
        "citation of nothing", lambda: jaxnorm.cite(), ValueError, r"^cite: found none.*0 arguments"
    ),
    Row(
        "citation of a Linen model without its input",
        lambda: jaxnorm.cite(Plain()),
        ValueError,
        r"^cite: the layers of Plain.*inputs=\(x,\)",
    ),
    Row(
        "citation of a model without norms",
        lambda: jaxnorm.cite(Plain(), inputs=(X,)),
        ValueError,
        r"^cite: found none",
    ),
]
