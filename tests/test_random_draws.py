"""Layers of random configurations against float64: results, running statistics and derivatives.

A draw is one number, the test's id: `pytest tests/test_random_draws.py -m "" -k "[17]"` tries it
again. The default run takes a handful, a run with -m slow all others; JAXNORM_DRAWS says how many
there are. What is allowed follows from dtypes alone, see `random_rounding.py`.
"""

import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_draws import drawn
from random_oracles import evidence, moved, oracle
from random_rounding import (
    NEAR,
    NEAR_JOINTLY,
    ROUNDINGS,
    as_wide,
    assert_within,
    differences,
    perturbed,
    rounded,
    unit,
)
from random_trials import Trial

DRAWS = int(os.environ.get("JAXNORM_DRAWS", 360))
QUICK = (0, 14, 29, 43, 58, 72)


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in range(DRAWS)]
)
def test_layer_is_its_oracle(seed):
    draw = drawn(seed)
    with jax.enable_x64(draw.dtype == "float64"), warnings.catch_warnings():
        # That few examples are normalized together.
        warnings.filterwarnings("ignore", ".* trains on ", UserWarning)
        jax.config.update("jax_disable_most_optimizations", not draw.optimized)
        try:
            Check(draw).everything()
        except Exception as error:
            error.add_note(str(draw))
            raise
        finally:
            jax.config.update("jax_disable_most_optimizations", False)


class Check:
    """What a trial found, held against the oracle."""

    def __init__(self, draw):
        self.draw, self.trial = draw, Trial(draw)
        self.params = as_wide(self.trial.params)
        self.clean = [np.where(np.isfinite(x), x, 0) for x in as_wide(self.trial.inputs)]
        self.computed = jnp.promote_types(jnp.float32, draw.dtype)
        suffix = "_b" if draw.call.get("domain") == "b" else ""
        self.names = [name + suffix for name in ("mean", "cov" if draw.whitens else "var")]
        self.updates = "updates" + suffix

    def everything(self):
        results, states, derivative = self.trial.found()
        if "dtype" in self.draw.options:
            assert results[0].dtype == self.draw.options["dtype"]
        for step, name in enumerate(("first", "second", "inference")[: len(results)]):
            running = [self.running(state) for state in states[step]] if states else [()]
            self.result(results[step], self.clean[min(step, 1)], running, name)
        for step in range(len(states) - 1):
            for device, (old, new) in enumerate(zip(*states[step : step + 2], strict=True)):
                self.state(old, new, step, device)
        self.derivative(derivative)

    def running(self, state):
        return [as_wide(state[name]) for name in self.names]

    def oracle(self, x, params, running=(), **options):
        return oracle(self.draw, x, params, self.trial.weights, running, **options)

    def perturbed(self, function, *arrays, u=None):
        """See `random_rounding.py`."""
        u = unit(self.computed) if u is None else u
        return perturbed(self.draw.rng(30), u, function, *arrays)

    def together(self, array):
        """Where features are mixed, rounding is that of the largest of them."""
        if not self.draw.whitens:
            return array
        return np.broadcast_to(array.max(self.draw.features, keepdims=True), array.shape)

    def result(self, found, x, running, what):
        """A result; each device with the running statistics that it had."""
        u, inference = unit(self.computed), what == "inference"
        if inference:  # The root of stored statistics may be taken in their dtype.
            u = max(u, unit(jnp.float32))

        def expected(x, seen, params, *running):
            return self.oracle(x, params, running, seen=seen, base=seen, inference=inference)

        each = [self.perturbed(expected, x, x, self.params, *own, u=u) for own in running]
        exact, effect = (self.joined(list(arrays)) for arrays in zip(*each, strict=True))
        bias = np.abs(self.params.get("bias", np.zeros(1))).max()
        allowed = ROUNDINGS * (effect + u * (self.together(np.abs(exact)) + bias))
        self.shown(found, exact, allowed + rounded(exact, found.dtype), what)

    def joined(self, each):
        """Of a whole array as each device would have it, the part that it has."""
        if len(each) == 1:
            return each[0]
        draw = self.draw
        parts = [np.split(array, draw.devices, draw.split) for array in each]
        return np.concatenate([parts[d][d] for d in range(draw.devices)], draw.split)

    def shown(self, found, exact, allowed, what):
        found, shown = self.trial.whole(found), self.trial.shown
        assert np.isfinite(found).all(), f"{what} is not finite"
        assert_within(found[shown], exact[shown], allowed[shown], what)

    def state(self, old, new, step, device):
        """The running statistics of a device after a step."""
        draw, what = self.draw, f"after step {step} on device {device}"
        still = {*old} - {*self.names, self.updates, "step"}
        for name in {*old} if not draw.options.get("update_stats", True) else still:
            if not name.startswith("pending"):
                np.testing.assert_array_equal(old[name], new[name], f"{name} {what}")
        if not draw.options.get("update_stats", True):
            return
        every = draw.options.get("update_every", 1)
        # Evidence waits in the dtype of the statistics.
        u = max(unit(self.computed), unit(old[self.names[0]].dtype) if every > 1 else 0)
        if step + 1 < every:
            np.testing.assert_array_equal(old[self.names[0]], new[self.names[0]], what)
            return
        batches = self.clean if every == 2 else self.clean[step : step + 1]
        places = np.repeat(draw.group_of, draw.shape[draw.split] // draw.devices)
        own = np.flatnonzero(places == draw.group_of[device])
        weights = np.take(self.trial.weights, own, draw.split)
        counted = as_wide(old[self.updates]) if self.updates in old else 0

        def seen(batches):
            taken = np.concatenate([np.take(x, own, draw.split) for x in batches], draw.split)
            return evidence(draw, taken, np.concatenate([weights] * len(batches), draw.split))

        def after(batches, *running):
            return moved(draw, running, seen(batches), counted)

        exact, effect = self.perturbed(after, batches, *self.running(old), u=u)
        effect[0][1] += u * self.shift_cost(old, *seen(batches)[1:])
        if draw.method == "BatchRenorm":  # sigma is averaged, which has the rounding of epsilon
            effect[0][1] += u * (draw.options["epsilon"] + np.abs(exact[0][1]))
        for name, value, change in zip(self.names, exact[0], effect[0], strict=True):
            allowed = ROUNDINGS * change + 4 * rounded(value, new[name].dtype)
            allowed += rounded(as_wide(old[name]), new[name].dtype)
            assert_within(new[name], value, allowed, f"{name} {what}")
        if self.updates in old:
            np.testing.assert_array_equal(as_wide(new[self.updates]), exact[1], what)

    def shift_cost(self, old, mean, var):
        """What a shift, the running mean or 0, costs a variance in units of roundoff."""
        if not (self.draw.whitens or self.draw.context):
            return 0.0  # Small inputs on one device are read twice.
        far = np.maximum(np.abs(mean), np.abs(mean - self.running(old)[0]))
        if not self.draw.whitens:
            return np.minimum(far**2, NEAR**2 * var)
        spread = np.sqrt(np.diagonal(var, axis1=-2, axis2=-1))
        far = np.minimum(far.reshape(spread.shape), NEAR_JOINTLY * spread)
        return far[:, :, None] * far[:, None, :]

    def derivative(self, found):
        trial = self.trial
        kind = self.draw.derivative
        if kind == "forward":
            exact, allowed = self.exact_derivative(by_x=1, by_params=1)
            self.shown(found, exact, allowed + rounded(exact, found.dtype), "tangent")
            return
        pairs = {"params": (found[0], trial.along_params), "x": (found[1], trial.along_x)}
        if kind == "second":
            exact = self.exact_derivative(by_x=1, by_params=1, order=2)
            self.contracted(pairs.values(), *exact, "the second derivative")
            return
        for what, pair in pairs.items():
            exact = self.exact_derivative(by_x=what == "x", by_params=what == "params")
            self.contracted([pair], *exact, f"the gradient by {what}")

    def contracted(self, pairs, exact, allowed, what):
        """A gradient times a direction, against the cotangent times the tangent."""
        products, rounding = [0.0], 0.0
        for gradient, direction in pairs:
            for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True):
                assert np.isfinite(as_wide(g)).all(), f"{what} is not finite"
                products.append((as_wide(g) * as_wide(d)).sum())
                rounding += (rounded(as_wide(g), g.dtype) * np.abs(as_wide(d))).sum()
        cotangent = self.trial.cotangent
        limit = (np.abs(cotangent) * allowed).sum() + rounding
        assert_within(sum(products), (cotangent * exact).sum(), limit, what)

    def exact_derivative(self, *, by_x, by_params, order=1):
        """Of the result along the trial's directions, and what rounding may change of it."""
        draw, trial, u = self.draw, self.trial, unit(self.computed)
        x, running = self.clean[0], self.running(trial.stats) if draw.runs else ()
        inference = draw.derivative == "inference"
        if inference:
            u = max(u, unit(jnp.float32))
        dx, dparams = as_wide((trial.along_x, trial.along_params))

        def of_held(t):
            """With the statistics held, where the result is linear in the input."""
            held = dict(seen=x, base=x, inference=inference)
            return self.oracle(x + t * np.abs(dx), self.params, running, **held)

        gain = self.together(np.abs(of_held(1) - of_held(-1)) / 2)

        def derivative(step, x, seen, params, *running):
            def along(t):
                moved = {name: p + t * by_params * dparams[name] for name, p in params.items()}
                own = dict(seen=seen + t * by_x * dx, base=x, inference=inference)
                return self.oracle(x + t * by_x * dx, moved, running, **own)

            return differences(along, step, order)

        plain = {**self.params, **self.plain_affine()}
        normalized, off = self.perturbed(
            lambda x, seen: self.oracle(
                x, plain, running, seen=seen, base=seen, inference=inference
            ),
            *(x, x),
            u=u,
        )
        terms = (by_x * gain + by_params * (1 + self.together(np.abs(normalized)))) ** order
        cotangent = np.abs(trial.cotangent)
        arrays = x, x, self.params, *running
        for step in 0.02 / max(gain.max(), 1) / np.array([1, 8, 64]):
            inexact = np.abs(derivative(step, *arrays) - derivative(step / 2, *arrays))
            if (cotangent * inexact).sum() <= 1e-5 * (cotangent * terms).sum():
                break
        else:
            raise AssertionError("no step is small enough for differences, and large enough")
        exact, effect = self.perturbed(lambda *a: derivative(step, *a), *arrays, u=u)
        # Tangents are multiplied by normalized values, which rounding has changed.
        return exact, ROUNDINGS * (effect + (u + off.max()) * terms) + 10 * inexact

    def plain_affine(self):
        """Scale 1 and bias 0."""
        one = 1 - self.draw.options.get("zero_centered_scale", False)
        values = {"scale": one, "bias": 0}
        return {k: np.full_like(self.params[k], v) for k, v in values.items() if k in self.params}
