"""The layers that draws name, as `modules.Layer`: pure functions, and those of weights as well."""

import re

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from modules import FRAMEWORKS, Layer, num_features

import jaxnorm
from jaxnorm import JointStats, Stats

NAMES = {
    "BatchNorm": "batch_norm",
    "BatchRenorm": "batch_renorm",
    "DecorrelatedBatchNorm": "decorrelated_batch_norm",
    "IterNorm": "iter_norm",
    "SwitchableNorm": "switchable_norm",
    "IBNa": "ibn_a",
    "InstanceNorm": "instance_norm",
    "IBNb": "ibn_b",
    "LayerNorm": "layer_norm",
    "RMSNorm": "rms_norm",
    "GroupNorm": "group_norm",
}
RULE = ("momentum", "debias", "running_var", "track_running_stats", "ghost_batch_size")


WEIGHT_NAMES = {
    "WeightNorm": "weight_norm",
    "WeightStandardization": "weight_standardization",
    "ScaledWeightStandardization": "scaled_weight_standardization",
    "SpectralNorm": "spectral_norm",
}


def layer_of(draw, x, options):
    """The layer of a draw, or what stands for it, for an input like `x`."""
    if draw.of_weights:
        return weight_layer(draw, x, options)
    if draw.framework == "function":
        return function_layer(draw, x, options)
    cls = getattr(getattr(jaxnorm, draw.framework), draw.method)
    return FRAMEWORKS[draw.framework](x, cls, param_dtype=jnp.dtype(draw.param_dtype), **options)


def function_layer(draw, x, options):
    """The pure functions, with running statistics moved as a layer moves them."""
    options = dict(options)
    rule = {name: options.pop(name) for name in RULE if name in options}
    dtype = jnp.dtype(draw.param_dtype)
    features = num_features(x, options)
    features = (features,) if isinstance(features, int) else features
    params = {}
    if options.pop("use_scale"):
        params["scale"] = jnp.ones(features, dtype)
    if options.pop("use_bias", False):
        params["bias"] = jnp.zeros(features, dtype)
    if draw.method == "SwitchableNorm":
        params |= {name: jnp.ones(3, dtype) for name in ("mean_weight", "var_weight")}
    for old, new in (("reduction_axes", "axes"), ("feature_axes", "axis")):
        if old in options:
            options[new] = options.pop(old)
    if "dtype" in options:
        options["dtype"] = jnp.dtype(options["dtype"])
    plain = getattr(jaxnorm, NAMES[draw.method])
    draw.options.pop("track_running_stats", None)
    norm = plain
    if "ghost_batch_size" in rule:
        norm = jaxnorm.ghost_batches(plain, rule["ghost_batch_size"])
    stats, updates = _first_stats(draw, features, rule)

    def affine(params):
        names = ("scale",) if draw.method == "RMSNorm" else ("scale", "bias")
        if draw.method == "IBNb":
            names = (None, *names)
        if draw.method == "SwitchableNorm":
            names = ("mean_weight", "var_weight", *names)
        return [params.get(name) for name in names]

    def kind(stats):
        if draw.whitens:
            return JointStats(stats["mean"].reshape(stats["cov"].shape[:2]), stats["cov"])
        return Stats(stats["mean"], stats["var"])

    def train(params, stats, x, mask=None):
        first = [kind(stats)] if draw.method == "BatchRenorm" else []
        shift = {} if not draw.runs else {"shift": stats["mean"]}
        y = norm(x, *first, *affine(params), where=mask, **shift, **options)
        if not draw.runs:
            return (y[0] if isinstance(y, tuple) else y), {}
        y, seen = y
        average = dict(momentum=rule["momentum"], debias=rule["debias"])
        if draw.method == "BatchRenorm":
            update, average["epsilon"] = jaxnorm.update_renorm, draw.epsilon
        else:
            joint = jaxnorm.update_running_covariance
            update = joint if draw.whitens else jaxnorm.update_running
            average["ddof"] = int(rule["running_var"] == "unbiased")
        new, count = update(kind(stats), seen, updates=stats.get("updates"), **average)
        result = {"mean": new.mean.reshape(-1) if draw.whitens else new.mean}
        result["cov" if draw.whitens else "var"] = new.cov if draw.whitens else new.var
        return y, result if count is None else result | {"updates": count}

    def infer(params, stats, x, mask=None):
        name = "batch_norm" if draw.method == "BatchRenorm" else NAMES[draw.method]
        of_training = {"rmax", "dmax", "num_groups", "group_size", "axis_name", "axis_index_groups"}
        kept = {name: value for name, value in options.items() if name not in of_training}
        shown = getattr(jaxnorm, f"{name}_inference")
        return shown(x, kind(stats), *affine(params), where=mask, **kept)

    return Layer(params, stats | updates, train, infer)


def _first_stats(draw, features, rule):
    if not draw.runs:
        return {}, {}
    if draw.whitens:
        (size,) = features
        k = size // draw.groups
        cov = jnp.broadcast_to(jnp.eye(k), (draw.groups, k, k))
        stats, counted = {"mean": jnp.zeros(size), "cov": cov}, (draw.groups,)
    else:
        if draw.method == "IBNa":
            features = (features[0] - round(draw.options["ratio"] * features[0]),)
        stats, counted = {"mean": jnp.zeros(features), "var": jnp.ones(features)}, features
    needed = rule["debias"] or rule["momentum"] is None
    return stats, {"updates": jnp.zeros(counted, jnp.int32)} if needed else {}


def weight_layer(draw, w, options):
    """The weight by which a layer computes, as a function of the stored one.

    A dense layer gives it away where the input is the identity.
    """
    options = dict(options)
    scaled = options.get("use_scale", False)
    shape = tuple(w.shape[axis] for axis in draw.features)
    params = {"scale": jnp.ones(shape, jnp.dtype(draw.param_dtype))} if scaled else {}
    stats = {"u": jnp.asarray(draw.first_vector, jnp.float32)} if draw.projects else {}
    if draw.framework == "function":
        options.pop("use_scale", None)
        options |= {"axis": options.pop("feature_axes")} if "feature_axes" in options else {}
        function = getattr(jaxnorm, WEIGHT_NAMES[draw.method])

        def train(params, stats, w):
            used = function(w, *params.values(), *stats.values(), **options)
            return (used[0] if draw.projects else used), {}

        return Layer(params, stats, train, train)

    if scaled:
        options["param_dtype"] = jnp.dtype(draw.param_dtype)
    cls = getattr(getattr(jaxnorm, draw.framework), draw.method)
    identity = jnp.eye(w.shape[0], dtype=w.dtype)
    call = {"update_stats": True} if draw.projects else {}

    def put(tree, values):
        """The variables with these values, which are known by words in their paths.

        What belongs to the kernel has it in its path as well: `scales/('kernel',)` in NNX.
        """

        def value(path, leaf):
            words = re.findall(r"[a-z]+", jax.tree_util.keystr(path).replace("scales", "scale"))
            role = next(name for name in ("scale", "u", "sigma", "kernel") if name in words)
            return values.get(role, leaf).reshape(leaf.shape).astype(leaf.dtype)

        return jax.tree_util.tree_map_with_path(value, tree)

    if draw.framework == "linen":
        dense = nn.Dense(w.shape[1], use_bias=False, param_dtype=w.dtype)
        module = cls(dense, **options)
        variables = module.init(jax.random.key(0), identity, **call)

        def used(values):
            variables_of_draw = put(variables, values)
            return module.apply(variables_of_draw, identity, mutable=["batch_stats"], **call)[0]

    else:
        rngs = nnx.Rngs(0)
        dense = nnx.Linear(*w.shape, use_bias=False, param_dtype=w.dtype, rngs=rngs)
        graph, state = nnx.split(cls(dense, rngs=rngs, **options))

        def used(values):
            return nnx.merge(graph, put(state, values))(identity, **call)

    def train(params, stats, w):
        return used({"kernel": w, **params, **stats}), {}

    return Layer(params, stats, train, train)
