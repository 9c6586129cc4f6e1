"""The pure functions as layers: `modules.Layer` without Flax."""

import jax.numpy as jnp
from modules import Layer, num_features

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


def function_layer(draw, x, options):
    """The pure functions of a draw's method, with running statistics moved as a layer moves them."""
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
        ddof = {} if draw.method == "BatchRenorm" else {"ddof": int(rule["running_var"] == "unbiased")}
        average = dict(momentum=rule["momentum"], debias=rule["debias"], **ddof)
        update = jaxnorm.update_running
        if draw.method == "BatchRenorm":
            update, average["epsilon"] = jaxnorm.update_renorm, draw.epsilon
        if draw.whitens:
            update = jaxnorm.update_running_covariance
        new, count = update(kind(stats), seen, updates=stats.get("updates"), **average)
        result = {"mean": new.mean.reshape(-1) if draw.whitens else new.mean}
        result["cov" if draw.whitens else "var"] = new.cov if draw.whitens else new.var
        return y, result if count is None else result | {"updates": count}

    def infer(params, stats, x, mask=None):
        name = "batch_norm" if draw.method == "BatchRenorm" else NAMES[draw.method]
        kept = {k: v for k, v in options.items() if not k.startswith("axis_")}
        kept = {k: v for k, v in kept.items() if k not in ("rmax", "dmax", "num_groups", "group_size")}
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
