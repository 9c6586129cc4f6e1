"""Layers of random configurations against float64: results, running statistics and derivatives.

A draw is one number, the test's id: `pytest tests/test_random_draws.py -m "" -k "[17]"` tries it
again. The default run takes a handful, `-m slow` all.

What is allowed follows from the dtype alone. A computation in a dtype with unit roundoff u is right
if its result is that of an input which differs by a few u of each number. So the oracle says itself
what rounding may do: the largest change of its result where inputs, parameters and stored statistics
change by u, in random directions and all in one. `ROUNDINGS` counts how many times that: from input
to result a number is rounded about a dozen times (two sums, two differences, square, division,
epsilon, root, reciprocal, product, scale, bias), the sums of a few dozen numbers a few times more.
Then the result is rounded once to its own dtype.
"""

import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from modules import FRAMEWORKS
from random_draws import METHODS, NARROW, drawn
from random_functions import function_layer
from random_oracles import evidence, moved, oracle

import jaxnorm

ROUNDINGS = 16
DRAWS = int(os.environ.get("JAXNORM_DRAWS", 390))
QUICK = (0, 14, 29, 43, 58, 72)
WEIGHTS = False


def as_wide(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), tree)


class Trial:
    """A draw with its arrays, as the library takes them and in float64."""

    def __init__(self, draw):
        self.draw = draw
        weights = draw.weights()
        self.mask = weights
        shown = np.ones(draw.shape) if weights is None else np.asarray(weights, np.float64)
        if draw.mask == "integer":
            shown = (shown != 0).astype(float)
        self.weights = np.broadcast_to(shown, draw.shape)
        self.valid = self.weights > 0
        self.inputs = [self._harmed(draw.input(step)) for step in range(2)]
        options = dict(draw.options)
        if draw.context:
            names = tuple("ab"[: len(draw.parts)])
            options |= dict(
                axis_name=names if len(names) > 1 else names[0],
                axis_index_groups=draw.device_groups,
            )
        if draw.framework == "function":
            self.layer = function_layer(draw, self.inputs[0], options)
        else:
            cls = getattr(getattr(jaxnorm, draw.framework), draw.method)
            options["param_dtype"] = jnp.dtype(draw.param_dtype)
            self.layer = FRAMEWORKS[draw.framework](self.inputs[0], cls, **options)
        self.params = self._drawn_params(self.layer.params)
        self.stats = self._drawn_stats(self.layer.stats)
        rng = draw.rng(20)
        signs = rng.choice([-1, 1], draw.shape) * draw.scale
        self.directions = {"x": jnp.asarray(np.where(self._untouched, signs, 0), draw.dtype)}
        self.directions["params"] = jax.tree.map(
            lambda p: jnp.asarray(rng.choice([-0.5, 0.5], p.shape), p.dtype), self.params
        )
        cotangent = rng.choice([-1.5, -1, 0.5, 1, 2], draw.shape)
        self.cotangent = np.where(self._untouched, cotangent, 0)

    @property
    def _untouched(self):
        return True if self.draw.harm is None else self.valid

    def _harmed(self, x):
        harm = self.draw.harm
        return x if harm is None else jnp.where(self.valid, x, jnp.asarray(harm, x.dtype))

    def _drawn_params(self, params):
        rng = self.draw.rng(21)
        return {
            name: value + jnp.asarray(0.3 * rng.normal(size=value.shape), value.dtype)
            for name, value in sorted(params.items())
        }

    def _drawn_stats(self, stats):
        draw = self.draw
        if not draw.warm:
            return stats
        rng = draw.rng(22)

        def warm(name, value):
            if name.startswith("mean"):
                noise = draw.mean + rng.normal(size=value.shape)
                return jnp.asarray(draw.scale * noise, value.dtype)
            if name.startswith("var"):
                return jnp.asarray(draw.scale**2 * rng.uniform(0.5, 2, value.shape), value.dtype)
            if name.startswith("cov"):
                return (draw.scale**2 * value).astype(value.dtype)
            return value

        return {name: warm(name, value) for name, value in stats.items()}

    # What the library does

    def found(self):
        """Two training steps and inference, and the derivative of the first, as `draw` says."""
        draw = self.draw
        call = dict(draw.call) if draw.framework != "function" else {}
        directions = self.directions["params"], self.directions["x"]
        cotangent = self._pieces(self.cotangent)

        def local(params, stats, xs, mask):
            said = call if mask is None else call | {"mask": mask}
            first, after = self.layer.train(params, stats, xs[0], **said)
            if not draw.runs:
                return dict(first=first)
            second, last = self.layer.train(params, after, xs[1], **said)
            shown = self.layer.infer(params, last, xs[1], **said)
            return dict(first=first, second=second, inference=shown, after=after, last=last)

        def target(params, stats, xs, mask):
            said = call if mask is None else call | {"mask": mask}
            if draw.derivative == "inference":
                return self.layer.infer(params, stats, xs[0], **said)
            return self.layer.train(params, stats, xs[0], **said)[0]

        mapped, mapped_target = self._mapped(local), self._mapped(target)
        stats, mask = self.stats, self.mask

        def loss(params, x):
            y = mapped_target(params, stats, (x,), mask)
            return (y.astype(jnp.promote_types(y.dtype, jnp.float32)) * cotangent).sum()

        def run(params, xs):
            result = mapped(params, stats, xs, mask)
            primals = params, xs[0]
            gradient = jax.grad(loss, (0, 1))
            if draw.derivative == "forward":
                derivative = jax.jvp(
                    lambda params, x: mapped_target(params, stats, (x,), mask), primals, directions
                )[1]
            elif draw.derivative == "second":
                derivative = jax.jvp(gradient, primals, directions)[1]
            else:
                derivative = gradient(*primals)
            return result, derivative

        return jax.jit(run)(self.params, tuple(self.inputs))

    def _pieces(self, array):
        """The parts of an array on each device, along new first axes, or copies."""
        draw = self.draw
        if not draw.context:
            return array
        if array.shape[draw.split] == 1:
            stacked = jnp.stack([array] * draw.devices)
        else:
            stacked = jnp.stack(jnp.split(jnp.asarray(array), draw.devices, draw.split))
        return stacked.reshape(*draw.parts, *stacked.shape[1:])

    def _mapped(self, local):
        """`local` on all devices; results have the mapped axes first."""
        draw = self.draw
        if not draw.context:
            return local
        names = "ab"[: len(draw.parts)]
        spread = draw.split in draw.features  # then parameters lie on devices, too

        def pieces_of_param(name, value):
            if not spread or name in ("mean_weight", "var_weight"):
                return jnp.broadcast_to(value, (*draw.parts, *value.shape))
            axis = draw.features.index(draw.split)
            stacked = jnp.stack(jnp.split(value, draw.devices, axis))
            return stacked.reshape(*draw.parts, *stacked.shape[1:])

        def run(params, stats, xs, mask):
            params = {name: pieces_of_param(name, value) for name, value in params.items()}
            xs, mask = (jax.tree.map(self._pieces, tree) for tree in (xs, mask))
            if draw.context == "vmap":
                function = local
                for name in reversed(names):
                    function = jax.vmap(function, in_axes=(0, None, 0, 0), axis_name=name)
                return function(params, stats, xs, mask)
            lead = (slice(None),) * 0 + (0,) * len(names)

            def one(params, stats, xs, mask):
                params, xs, mask = jax.tree.map(lambda leaf: leaf[lead], (params, xs, mask))
                result = local(params, stats, xs, mask)
                return jax.tree.map(lambda leaf: leaf[(None,) * len(names)], result)

            mesh = jax.make_mesh(draw.parts, tuple(names), axis_types=(AxisType.Auto,) * len(names))
            specs = P(*names), P(), P(*names), P(*names)
            checked = draw.context == "shard_map"
            return jax.shard_map(
                one, mesh=mesh, in_specs=specs, out_specs=P(*names), check_vma=checked
            )(params, stats, xs, mask)

        return run

    def whole(self, array):
        """What lies on devices, put together along the split axis."""
        draw = self.draw
        array = np.asarray(array).astype(np.float64)
        if not draw.context:
            return array
        stacked = array.reshape(draw.devices, *array.shape[len(draw.parts) :])
        return np.concatenate(list(stacked), draw.split)

    # What is expected

    def names(self):
        """The names of the running statistics that a call moves."""
        draw = self.draw
        suffix = "_b" if draw.call.get("domain") == "b" and draw.framework != "function" else ""
        return [name + suffix for name in ("mean", "cov" if draw.whitens else "var")]

    def running(self, stats):
        return [as_wide(stats[name]) for name in self.names()] if self.draw.runs else None

    def clean(self, x):
        """The input in float64, 0 where the layer is to take no harm."""
        return np.where(np.isfinite(x := as_wide(x)), x, 0)

    def unit(self, *dtypes):
        """The unit roundoff of a computation with these dtypes."""
        wide = jnp.promote_types(jnp.float32, self.draw.dtype)
        return float(jnp.finfo(wide).eps) / 2

    def perturbed(self, function, *arrays):
        """The result of `function`, and how much it changes where `arrays` are rounded."""
        rng, u = self.draw.rng(30), self.unit()
        exact = function(*arrays)
        patterns = [np.sign] + [lambda a: a.dtype.type(1) * rng.choice([-1, 1], a.shape)] * 6

        def moved_by(pattern):
            return jax.tree.map(lambda a: a + u * np.abs(a) * pattern(np.asarray(a)), arrays)

        changes = []
        for pattern in patterns:
            changed = function(*moved_by(pattern))
            changes.append(jax.tree.map(lambda a, b: np.abs(a - b), changed, exact))
        return exact, jax.tree.map(lambda *c: np.max(c, 0), *changes)


def close(found, expected, allowed, what, trial):
    off = np.abs(found - expected) > allowed
    off |= ~np.isfinite(found)
    if off.any():
        at = np.unravel_index(np.argmax(np.where(off, np.abs(found - expected) / allowed, 0)), off.shape)
        raise AssertionError(
            f"{what}: {off.sum()} of {off.size} off, the worst at {at}: found {found[at]}, "
            f"expected {expected[at]} up to {allowed[at]}.\n{trial.draw}"
        )


def check_result(trial, found, expected, effect, params, what):
    dtype = found.dtype
    found = trial.whole(found)
    u = trial.unit()
    bias = np.abs(params["bias"]).max() if "bias" in params else 0
    allowed = ROUNDINGS * (effect + u * (np.abs(expected) + bias))
    allowed += float(jnp.finfo(dtype).eps) / 2 * np.abs(expected)
    allowed += float(jnp.finfo(dtype).smallest_subnormal)
    shown = trial.valid if trial.draw.harm is not None else np.ones_like(trial.valid)
    assert np.isfinite(found).all(), f"{what}: not finite.\n{trial.draw}"
    found, expected, allowed = (np.where(shown, a, 0) for a in (found, expected, allowed))
    close(found, expected, allowed + ~shown, what, trial)


def check_step(trial, before, after, x, batches, what):
    """The running statistics after a step, on each device."""
    draw = trial.draw
    names = trial.names()
    counts = [name.replace("mean", "updates") for name in names[:1]]
    touched = {*names, *counts, "step"}
    devices = draw.devices if draw.context else 1
    group_of = draw.group_of if draw.context else np.zeros(1, int)
    local = np.repeat(group_of, draw.shape[draw.split] // devices)

    def of_device(tree, device):
        if not draw.context:
            return tree
        return {k: v.reshape(devices, *v.shape[len(draw.parts) :])[device] for k, v in tree.items()}

    for device in range(devices):
        old, new = (of_device(tree, device) for tree in (before, after))
        for name in set(old) - touched:
            np.testing.assert_array_equal(old[name], new[name], name)
        own = np.flatnonzero(local == group_of[device])
        weights = np.take(trial.weights, own, draw.split)
        updates = as_wide(old[counts[0]]) if counts[0] in old else 0.0

        def step(x, *running):
            seen = evidence(draw, np.take(x, own, draw.split), weights)
            return moved(draw, running, seen, updates)[0]

        seen = evidence(draw, np.take(x, own, draw.split), weights)
        if counts[0] in old:
            expected = moved(draw, trial.running(old), seen, updates)[1]
            np.testing.assert_array_equal(as_wide(new[counts[0]]), expected, f"{what}\n{draw}")
        exact, effect = trial.perturbed(step, x, *trial.running(old))
        for name, value, change in zip(names, exact, effect, strict=True):
            u = float(jnp.finfo(new[name].dtype).eps) / 2
            allowed = ROUNDINGS * change + 4 * u * np.abs(value)
            allowed += u * np.abs(as_wide(old[name])) + 1e-45
            close(as_wide(new[name]), value, allowed, f"{name} after {what}", trial)


NODES = np.arange(-3, 4)
FIRST = np.array([-1 / 60, 3 / 20, -3 / 4, 0, 3 / 4, -3 / 20, 1 / 60])
SECOND = np.array([1 / 90, -3 / 20, 3 / 2, -49 / 18, 3 / 2, -3 / 20, 1 / 90])


def differences(function, step, order):
    """The derivative at 0 of a function of a number, by central differences of sixth order."""
    values = np.stack([function(step * node) for node in NODES])
    stencil = FIRST if order == 1 else SECOND
    return np.tensordot(stencil, values, 1) / step**order


def check_derivative(trial, found):
    draw, u = trial.draw, trial.unit()
    x, params = trial.clean(trial.inputs[0]), as_wide(trial.params)
    running = trial.running(trial.stats)
    dx, dparams = as_wide(trial.directions["x"]), as_wide(trial.directions["params"])
    options = dict(inference=draw.derivative == "inference")

    def moved_to(x, params, t, by_x, by_params):
        return x + t * by_x * dx, {k: v + t * by_params * dparams[k] for k, v in params.items()}

    def held(t):
        """With the statistics held, where it is linear in the input, with all signs alike."""
        y = oracle(
            draw, x + t * np.abs(dx), params, trial.weights, running, seen=x, base=x, **options
        )
        return y

    gain = np.abs(held(1.0) - held(-1.0)) / 2
    step = 0.02 / max(gain.max(), 1)

    def derivative(by_x, by_params, order):
        def of(x, params, step):
            def along(t):
                a, b = moved_to(x, params, t, by_x, by_params)
                return oracle(draw, a, b, trial.weights, running, base=x, **options)

            return differences(along, step, order)

        exact, effect = trial.perturbed(lambda x, params: of(x, params, step), x, params)
        error = np.abs(exact - of(x, params, step / 2))
        own = gain * by_x + sum(
            np.abs(oracle(draw, x, params, trial.weights, running, **options)) for _ in [0]
        ) * bool(by_params)
        own = own**order if order == 2 else own
        scale = np.abs(trial.cotangent * own)
        assert (np.abs(trial.cotangent * error)).sum() <= 1e-5 * scale.sum() + 1e-300, (
            f"the differences are not exact enough: {error.max()}\n{draw}"
        )
        return exact, ROUNDINGS * (effect + u * own) + 10 * error

    def contracted(gradient, direction, exact, allowed, what):
        gradient, direction = as_wide(gradient), as_wide(direction)
        leaves = list(zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
        value = sum((g * d).sum() for g, d in leaves)
        rounding = sum((np.abs(g * d)).sum() * e for (g, d), e in zip(leaves, eps(what), strict=True))
        expected = (trial.cotangent * exact).sum()
        limit = (np.abs(trial.cotangent) * allowed).sum() + rounding
        close(np.array([value]), np.array([expected]), np.array([limit]), f"derivative by {what}", trial)

    def eps(what):
        of = {"x": [trial.directions["x"]], "params": jax.tree.leaves(trial.directions["params"])}
        of["both"] = of["params"] + of["x"]
        return [float(jnp.finfo(leaf.dtype).eps) / 2 for leaf in of[what]]

    if draw.derivative == "forward":
        exact, allowed = derivative(1, 1, 1)
        allowed = allowed + float(jnp.finfo(found.dtype).eps) / 2 * np.abs(exact)
        shown = np.broadcast_to(trial._untouched, exact.shape)
        tangent = trial.whole(found)
        assert np.isfinite(tangent).all(), f"tangent not finite\n{draw}"
        found, exact, allowed = (np.where(shown, a, 0) for a in (tangent, exact, allowed))
        close(found, exact, allowed + ~shown + 1e-45, "tangent", trial)
    elif draw.derivative == "second":
        exact, allowed = derivative(1, 1, 2)
        contracted(found, (trial.directions["params"], trial.directions["x"]), exact, allowed, "both")
    else:
        for at, what in enumerate(("params", "x")):
            if not jax.tree.leaves(found[at]):
                continue
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(as_wide(found[at])))
            exact, allowed = derivative(what == "x", what == "params", 1)
            contracted(found[at], trial.directions[what], exact, allowed, what)


def check(draw):
    trial = Trial(draw)
    result, derivative = trial.found()
    params = as_wide(trial.params)
    states = [trial.stats]
    if draw.context:
        states = [
            {k: jnp.broadcast_to(v, (*draw.parts, *v.shape)) for k, v in trial.stats.items()}
        ]
    if draw.runs:
        states += [result["after"], result["last"]]

    def expected(x, params, *running, inference=False):
        return oracle(draw, x, params, trial.weights, running, inference=inference)

    for step, name in enumerate(("first", "second")[: 1 + draw.runs]):
        x = trial.clean(trial.inputs[step])
        for device in range(draw.devices if draw.method == "BatchRenorm" else 1):
            pass
        running = trial.running(_one(states[step], draw)) or ()
        if step == 1 and draw.method == "BatchRenorm" and draw.device_groups:
            break
        exact, effect = trial.perturbed(expected, x, params, *running)
        check_result(trial, result[name], exact, effect, params, f"{name} training step")
    if not draw.runs:
        check_derivative(trial, derivative)
        return
    for step in range(2):
        x = trial.clean(trial.inputs[step])
        check_step(trial, states[step], states[step + 1], x, None, f"step {step}")
    if not draw.device_groups:
        x = trial.clean(trial.inputs[1])
        running = trial.running(_one(states[2], draw))
        exact, effect = trial.perturbed(
            lambda *a: expected(*a, inference=True), x, params, *running
        )
        check_result(trial, result["inference"], exact, effect, params, "inference")
    check_derivative(trial, derivative)


def _one(stats, draw):
    if not draw.context:
        return stats
    return {k: v.reshape(draw.devices, *v.shape[len(draw.parts) :])[0] for k, v in stats.items()}


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in range(DRAWS)]
)
def test_layer_is_its_oracle(seed):
    draw = drawn(seed, WEIGHTS)
    with jax.enable_x64(draw.dtype == "float64"), warnings.catch_warnings():
        # That few examples are normalized together.
        warnings.filterwarnings("ignore", ".* trains on ", UserWarning)
        jax.config.update("jax_disable_most_optimizations", not draw.optimized)
        try:
            check(draw)
        finally:
            jax.config.update("jax_disable_most_optimizations", False)
