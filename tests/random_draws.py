"""A configuration of a layer and its input, drawn by one number."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

BATCH = ("BatchNorm", "BatchRenorm", "AdaBN")
WHITENING = ("DecorrelatedBatchNorm", "IterNorm")
EXAMPLES_FIRST = ("SwitchableNorm", "IBNa", "InstanceNorm", "IBNb")
LAYER = ("LayerNorm", "RMSNorm")
SCALED_WEIGHTS = ("WeightNorm", "ScaledWeightStandardization")
WEIGHTS = (*SCALED_WEIGHTS, "WeightStandardization", "SpectralNorm")
METHODS = (*BATCH, *WHITENING, *EXAMPLES_FIRST, *LAYER, "GroupNorm", *WEIGHTS)
RUNNING = (*BATCH, *WHITENING, "SwitchableNorm", "IBNa")
NARROW = ("bfloat16", "float16")


@dataclasses.dataclass
class Draw:
    """What is tried.

    Attributes:
        seed: draws all the rest.
        method: name of the classes.
        framework: "linen", "nnx", or "function" for the pure functions.
        shape: of the input, of all devices together.
        features: feature axes, increasing.
        reduced: the axes that layer and group norm take statistics along.
        groups: of features.
        options: of the layer.
        dtype, param_dtype: of the input and the parameters.
        mean, scale: of the input; the mean in units of the scale.
        mask: None, "boolean", "integer" or "weights".
        mask_shape: of the mask.
        harm: what stands under the mask, or None for what stands there anyway.
        context: None for one device, or how devices are mapped.
        parts: sizes of the mapped axes.
        split: the axis of the input that is spread over devices, or over ghost batches.
        device_groups: axis_index_groups, or None for all together.
        warm: whether running statistics are near those of the data.
        derivative: "reverse", "forward", "second" (forward over reverse), of training; or of
            "inference".
        call: what is said at a call.
        optimized: whether the compiler is to do all it can.
    """

    seed: int
    method: str
    framework: str = "linen"
    shape: tuple[int, ...] = ()
    features: tuple[int, ...] = ()
    reduced: tuple[int, ...] = ()
    groups: int = 1
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    param_dtype: str = "float32"
    mean: float = 0.0
    scale: float = 1.0
    mask: str | None = None
    mask_shape: tuple[int, ...] = ()
    harm: float | None = None
    context: str | None = None
    parts: tuple[int, ...] = ()
    split: int = 0
    device_groups: list[list[int]] | None = None
    warm: bool = False
    derivative: str = "reverse"
    call: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimized: bool = False

    @property
    def whitens(self):
        return self.method in WHITENING

    @property
    def of_weights(self):
        """Whether the input is a weight."""
        return self.method in WEIGHTS

    @property
    def projects(self):
        """Whether a singular vector is stored."""
        return self.method == "SpectralNorm"

    @property
    def first_vector(self):
        """The first approximation of a singular vector."""
        return self.rng(23).normal(size=self.shape[-1]).astype(np.float32).astype(np.float64)

    @property
    def runs(self):
        """Whether there are running statistics."""
        return self.method in RUNNING or self.options.get("track_running_stats", False)

    @property
    def epsilon(self):
        return self.options["epsilon"]

    @property
    def momentum(self):
        """The default."""
        return 0.9 if self.method in (*WHITENING, "SwitchableNorm") else 0.99

    @property
    def devices(self):
        return int(np.prod(self.parts)) if self.context else 1

    @property
    def names(self):
        """Of the mapped axes."""
        return ("a", "b")[: len(self.parts)]

    @property
    def group_of(self):
        """The group of each device."""
        group_of = np.zeros(self.devices, int)
        for number, members in enumerate(self.device_groups or []):
            group_of[members] = number
        return group_of

    @property
    def labels(self):
        """Which of what is normalized together an index along the split axis belongs to."""
        size = self.shape[self.split]
        if self.options.get("ghost_batch_size"):
            return np.arange(size) // self.options["ghost_batch_size"]
        return np.repeat(self.group_of, size // self.devices)

    def at(self, own):
        """The places of these indices along the split axis."""
        return (slice(None),) * self.split + (own,)

    def rng(self, part):
        return np.random.default_rng([self.seed, part])

    def drawn_input(self, step):
        """An input; one feature has twice the spread of another, and some mean of its own."""
        rng = self.rng(1 + step)
        values = rng.normal(size=self.shape)
        features = [n if a in self.features else 1 for a, n in enumerate(self.shape)]
        values = values * rng.uniform(0.7, 1.4, features) + rng.normal(size=features)
        if self.whitens and self.shape[self.features[0]] > 1:
            values = values + 0.5 * np.roll(values, 1, self.features[0])
        return jnp.asarray(self.scale * (values + self.mean), self.dtype)

    def drawn_mask(self):
        """The mask as the layer takes it, or None."""
        if self.mask is None:
            return None
        rng = self.rng(10)
        valid = rng.random(self.mask_shape) < rng.choice([0.4, 0.8])
        if self.mask == "boolean":
            return jnp.asarray(valid)
        if self.mask == "integer":
            return jnp.asarray(valid * rng.integers(1, 4, self.mask_shape), jnp.int32)
        return jnp.asarray(valid * rng.integers(1, 13, self.mask_shape) / 4, jnp.float32)

    def __str__(self):
        fields = dataclasses.asdict(self)
        default = Draw(0, "")
        shown = {k: v for k, v in fields.items() if v != getattr(default, k)}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def drawn(seed: int) -> Draw:
    """The configuration of this number."""
    rng = np.random.default_rng([seed, 0])
    draw = Draw(seed, METHODS[seed % len(METHODS)])

    def sometimes(share):
        return bool(rng.random() < share)

    def one_of(*values):
        return values[rng.integers(len(values))]

    draw.framework = one_of("linen", "nnx", *(["function"] if draw.method != "AdaBN" else []))
    _draw_axes(draw, rng, one_of)
    if not draw.of_weights:
        _draw_devices(draw, rng, sometimes, one_of)
    dtypes = ["float32", "bfloat16", "float16", "float64"]
    draw.dtype = str(rng.choice(dtypes, p=[0.4, 0.2, 0.15, 0.25]))
    draw.param_dtype = one_of("float32", "float32", draw.dtype)
    draw.mean = float(one_of(0, 0, 1, 30, 1e3, 1e4)) * one_of(-1, 1)
    # Powers of two, and few of them where float16 would overflow.
    draw.scale = float(one_of(1, 1, 2.0**-20, 2.0**-7, 2.0**7, 2.0**20))
    if draw.dtype == "float16":
        draw.scale = float(one_of(0.25, 1, 2))
    smallest = 1e-5 * min(draw.scale**2, 1)
    draw.options["epsilon"] = float(one_of(smallest, smallest, 1e-5, 0.1 * draw.scale**2))
    # Less, and where a variance is 0 also float64 would be too coarse for differences.
    draw.options["epsilon"] = max(draw.epsilon, 1e-8 * draw.scale**2)
    if draw.dtype == "float16":
        draw.options["epsilon"] = max(draw.epsilon, 1e-4)
    draw.mask = rng.choice(["", "boolean", "integer", "weights"], p=[0.35, 0.3, 0.05, 0.3]) or None
    draw.mask = None if draw.mask is None or draw.of_weights else str(draw.mask)
    if draw.mask is not None:
        sizes = [n if sometimes(0.7) else 1 for n in draw.shape]
        if draw.whitens:
            sizes[draw.features[0]] = 1
        draw.mask_shape = tuple(sizes)
        draw.harm = one_of(None, None, np.nan, np.inf)
        if draw.scale > 2**7:  # Under a mask, numbers above 4e9 are taken for 0.
            draw.mean = float(np.clip(draw.mean, -1e3, 1e3))
    draw.warm = sometimes(0.5)
    _draw_options(draw, sometimes, one_of)
    draw.derivative = one_of("reverse", "reverse", "forward", "second", "inference")
    if draw.derivative == "inference" and not draw.runs:
        draw.derivative = "reverse"
    if draw.derivative == "second" and draw.dtype in NARROW:
        draw.derivative = "forward"
    draw.optimized = sometimes(0.2)
    return draw


def _draw_axes(draw, rng, one_of):
    """Which axes are features', and the sizes of all."""
    first = draw.method in EXAMPLES_FIRST
    ndim = int(rng.integers(3 if first or draw.method == "GroupNorm" else 2, 5))
    if draw.of_weights and draw.framework != "function":
        ndim = 2  # those of a dense layer
    axes = range(1 if first or draw.method == "GroupNorm" else 0, ndim)
    one = (*WHITENING, "IBNa", "GroupNorm", "SpectralNorm")
    several = draw.method not in one and len(axes) > 2
    number = one_of(1, 1, 2) if several else 1
    last = draw.projects or one_of(False, True)
    chosen = range(ndim - number, ndim) if last else rng.choice(axes, number, replace=False)
    draw.features = tuple(sorted(int(a) for a in chosen))
    sizes = [int(n) for n in rng.integers(2, 5, ndim)]
    others = [a for a in range(ndim) if a not in draw.features]
    if draw.method in LAYER:
        number = int(rng.integers(1, min(ndim, 2) + 1))
        draw.reduced = tuple(sorted(int(a) for a in rng.choice(ndim, number, replace=False)))
    elif draw.method == "GroupNorm":
        space = [a for a in others if a]
        keep = [a for a in space if one_of(0, 1, 1)]
        draw.reduced = tuple(sorted([*keep, *draw.features]))
    if draw.method == "GroupNorm" or draw.whitens:
        draw.groups = one_of(1, 2, 3) if not draw.whitens else one_of(1, 2)
        sizes[draw.features[0]] = draw.groups * one_of(2, 3)
    if draw.whitens:
        sizes[others[0]] = one_of(8, 12)
    draw.shape = tuple(sizes)


def _draw_devices(draw, rng, sometimes, one_of):
    """Whether and how devices share the input, or ghost batches divide it."""
    others = tuple(a for a in range(len(draw.shape)) if a not in draw.features)
    pooled = {
        **dict.fromkeys(LAYER, draw.reduced),
        "GroupNorm": [a for a in draw.reduced if a not in draw.features],
        **dict.fromkeys(("SwitchableNorm", "IBNa"), (0,)),
        "InstanceNorm": [a for a in others if a],
        "IBNb": [a for a in others if a],
    }.get(draw.method, others)
    if not pooled:
        return
    draw.split = int(one_of(*pooled))
    ghost = draw.method in RUNNING and 0 in pooled and sometimes(0.2)
    if ghost:
        draw.split = 0
    local = one_of(1, 2, 3)
    if sometimes(0.45):
        draw.context = one_of("vmap", "shard_map", "shard_map unchecked")
        draw.parts = one_of((2,), (4,), (8,), (2, 2), (3,))
        if draw.whitens:
            local = -(-8 // draw.devices) * local
        sizes = list(draw.shape)
        sizes[draw.split] = local * draw.devices
        draw.shape = tuple(sizes)
        if not ghost and sometimes(0.35):
            order = [int(d) for d in rng.permutation(draw.devices)]
            cut = int(rng.integers(1, draw.devices))
            half = draw.devices // 2
            draw.device_groups = one_of(
                [list(range(half)), list(range(half, draw.devices))],
                [order[:cut], order[cut:]],
                [list(range(0, draw.devices, 2)), list(range(1, draw.devices, 2))],
            )
    if ghost:
        local = draw.shape[0] // draw.devices
        sizes = [k for k in range(1, local + 1) if local % k == 0]
        sizes += [local * k for k in range(2, draw.devices + 1) if draw.devices % k == 0]
        draw.options["ghost_batch_size"] = one_of(*sizes)


def _draw_options(draw, sometimes, one_of):
    options, ndim = draw.options, len(draw.shape)
    axes = [a - ndim if sometimes(0.5) else a for a in draw.features]
    axes = axes[0] if len(axes) == 1 else tuple(axes)
    if draw.of_weights:
        if draw.projects:
            options["n_steps"] = one_of(1, 3)
        else:
            options["feature_axes"] = axes
        if draw.method in SCALED_WEIGHTS:
            options["use_scale"] = sometimes(0.7)
        if draw.framework == "function" and sometimes(0.25):
            options["dtype"] = one_of("float32", draw.dtype)
        return
    if draw.method in LAYER:
        options |= dict(reduction_axes=draw.reduced, feature_axes=axes)
    else:
        options["feature_axes" if draw.method == "InstanceNorm" else "axis"] = axes
    if draw.method == "GroupNorm":
        options["reduction_axes"] = draw.reduced
    if draw.method == "GroupNorm" or draw.whitens:
        options |= dict(num_groups=draw.groups)
        if sometimes(0.5):
            size = draw.shape[draw.features[0]] // draw.groups
            options |= dict(num_groups=None, group_size=size)
    if draw.method == "IterNorm":
        options["n_steps"] = one_of(1, 3, 5)
    if draw.method == "BatchRenorm":
        options |= dict(rmax=one_of(1.0, 1.5, 3.0), dmax=one_of(0.0, 0.5, 5.0))
    if draw.method == "IBNa":
        options["ratio"] = 0.5
    if draw.method == "InstanceNorm" and draw.framework != "function" and sometimes(0.5):
        options["track_running_stats"] = True
    if draw.method == "AdaBN":
        options["domains"] = ("a", "b")
        draw.call["domain"] = one_of("a", "b")
    if draw.framework != "function":
        options["zero_centered_scale"] = sometimes(0.2)
    options["use_scale"] = sometimes(0.85)
    if draw.method != "RMSNorm":
        options["use_bias"] = sometimes(0.85)
    if sometimes(0.25):
        options["dtype"] = one_of("float32", "bfloat16", draw.dtype)
    if draw.runs:
        options["momentum"] = one_of(0.9, 0.99, 0.5, None, 0.0)
        options["debias"] = options["momentum"] is not None and sometimes(0.3)
        if draw.method != "BatchRenorm":
            options["running_var"] = one_of("biased", "unbiased")
        if draw.framework != "function":
            options["skip_nonfinite"] = sometimes(0.2)
            options["update_stats"] = sometimes(0.9)
            if draw.method != "InstanceNorm" and sometimes(0.2):
                options["update_every"] = 2
    if draw.framework != "function" and not draw.context and sometimes(0.1):
        options |= dict(axis_name="nowhere", unbound_axis="local")
