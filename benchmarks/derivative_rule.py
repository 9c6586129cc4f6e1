"""Four ways to differentiate batch normalization, side by side: time, memory, collectives.

    python benchmarks/derivative_rule.py

- rule: the library's, a rule for the tangent inside `jax.checkpoint` (core/fused.py);
- named: the plain composition under `jax.checkpoint`, told to keep mean and rstd;
- plain: the plain composition, as JAX differentiates it;
- flax: `flax.linen.BatchNorm` with its two-pass variance, the one that is right at large means.

One round times each way once, in an order that rotates, so that whatever else the machine does
meets all of them; reported are medians over the rounds as ratios to the rule. "flax again" is
timed like another way: how far its ratio lies from that of "flax" is the noise.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxnorm
from jaxnorm.core.devices import Devices
from jaxnorm.core.fused import normalize_fused
from jaxnorm.core.moments import moments_keeping_axes
from jaxnorm.core.standardize import Plan, normalize_plainly
from jaxnorm.diagnose import collectives

jax.config.update("jax_num_cpu_devices", 8)

EPSILON = 1e-5


@dataclass(frozen=True)
class Options:
    """What to measure."""

    shape: tuple[int, ...] = (64, 32, 32, 64)
    """Shape of the input; the last axis holds the features."""

    rounds: int = 15
    """Rounds of timing."""

    repeats: int = 3
    """Training steps of each way in a round."""


def normalize_with_names(plan: Plan, x, scale, bias, where):
    """The plain composition, whose statistics are named so that a checkpoint can keep them."""
    del where

    def plainly(x, scale, bias):
        seen = moments_keeping_axes(x, plan.axes, None, plan.over, plan.use_mean)
        mean = checkpoint_name(seen.mean, "mean")
        rstd = checkpoint_name(lax.rsqrt(seen.var + plan.epsilon), "rstd")
        y = (x.astype(mean.dtype) - mean) * rstd * scale + bias
        return y.astype(plan.dtype)

    keep = jax.checkpoint_policies.save_only_these_names("mean", "rstd")
    return jax.checkpoint(plainly, policy=keep, prevent_cse=False)(x, scale, bias), None


def normalize_by_flax(plan: Plan, x, scale, bias, where):
    """Flax's layer, given the same parameters."""
    del where
    layer = nn.BatchNorm(
        use_running_average=False,
        epsilon=plan.epsilon,
        dtype=plan.dtype,
        use_fast_variance=False,
        axis_name=None if plan.over is None else plan.over.names[0],
    )
    features = scale.reshape(-1)
    variables = {
        "params": {"scale": features, "bias": bias.reshape(-1)},
        "batch_stats": {"mean": jnp.zeros_like(features), "var": jnp.ones_like(features)},
    }
    return layer.apply(variables, x, mutable=["batch_stats"])[0], None


def normalize_about_zero(plan: Plan, x, scale, bias, where):
    """The rule with a known shift, as batch norm uses it with its running mean."""
    return normalize_fused(plan, x, scale, bias, where, jnp.zeros(scale.shape))


WAYS: dict[str, Callable[..., Any]] = {
    "rule": normalize_about_zero,
    "two passes": normalize_fused,
    "named": normalize_with_names,
    "plain": normalize_plainly,
    "flax": normalize_by_flax,
    "flax again": normalize_by_flax,
}


def value_of(way: str, plan: Plan, x, scale, bias):
    """The normalized array alone."""
    return WAYS[way](plan, x, scale, bias, None)[0]


def training_step(way: str, plan: Plan):
    """Forward and backward through the layer, for given gradients of its output."""

    @jax.jit
    def step(x, scale, bias, dy):
        y, backward = jax.vjp(partial(value_of, way, plan), x, scale, bias)
        return y, backward(dy)

    return step


def kept_for_backward(way: str, plan: Plan, x, scale, bias) -> float:
    """Bytes held by the vjp over the bytes of the input."""
    _, backward = jax.vjp(partial(value_of, way, plan), x, scale, bias)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(backward)) / x.nbytes


def all_reduces(way: str, plan: Plan, x, scale, bias) -> int:
    """Collectives that forward and backward always take under `shard_map` on eight devices."""
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    shared = plan._replace(over=Devices(("batch",)))
    sharded = jax.shard_map(
        partial(value_of, way, shared),
        mesh=mesh,
        in_specs=(P("batch"), P(), P()),
        out_specs=P("batch"),
    )

    @jax.jit
    def step(x, scale, bias, dy):
        y, backward = jax.vjp(sharded, x, scale, bias)
        return y, backward(dy)

    traffic = collectives(step.lower(x, scale, bias, x).compile())
    return sum(not one.conditional for one in traffic)


def times(steps: dict[str, Callable[..., Any]], arguments, options: Options, label: str):
    """Seconds of each way, one number a round."""
    names = list(steps)
    for name in names:
        jax.block_until_ready(steps[name](*arguments))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in track(range(options.rounds), description=label, transient=True):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            for _ in range(options.repeats):
                jax.block_until_ready(steps[name](*arguments))
            seconds[name].append((time.perf_counter() - start) / options.repeats)
    return seconds


def main(options: Options) -> None:
    """Measures and prints one table."""
    device = jax.devices()[0].device_kind
    table = Table(
        title=f"batch norm, training step, input {list(options.shape)}",
        caption=f"jax {jax.__version__} on {device}, jaxnorm {jaxnorm.__version__}; time relative "
        f"to the rule, with quartiles; kept: bytes held for the backward pass over those of x",
    )
    for heading in ("dtype", "way", "time", "kept", "all-reduces on 8 devices"):
        table.add_column(heading, justify="right" if heading in ("time", "kept") else "left")
    for dtype in (jnp.dtype("float32"), jnp.dtype("bfloat16")):
        keys = jax.random.split(jax.random.key(0))
        x, dy = (jax.random.normal(key, options.shape, dtype) for key in keys)
        features = (1,) * (x.ndim - 1) + x.shape[-1:]
        parameters = jnp.ones(features), jnp.zeros(features)
        plan = Plan(tuple(range(x.ndim - 1)), EPSILON, None, dtype)
        steps = {way: training_step(way, plan) for way in WAYS}
        seconds = times(steps, (x, *parameters, dy), options, str(dtype))
        for way in WAYS:
            ratios = [a / b for a, b in zip(seconds[way], seconds["rule"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            table.add_row(
                str(dtype),
                way,
                f"{middle:.2f} ({low:.2f} to {high:.2f})",
                f"{kept_for_backward(way, plan, x, *parameters):.2f}",
                str(all_reduces(way, plan, x, *parameters)),
            )
    Console(width=110).print(table)


if __name__ == "__main__":
    main(tyro.cli(Options))
