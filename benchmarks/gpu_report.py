"""How near to a plain copy each normalization comes on a GPU, forward and backward.

    python benchmarks/gpu_report.py
    python benchmarks/gpu_report.py --platform cpu     # small arrays: tries the report, not the GPU

The memory of a GPU bounds what a normalization can do: forward, x is read and y written, backward x
and dy are read and dx is written, five times x. The share is the time that a copy of as many bytes
takes, measured in the same rounds, over the time of the step. Batch norm has to read x, and
backward x and dy, twice, since no chip holds a batch: it is given eight.

A step is forward and backward in one program, in which dy waits for y, as it does in a model. In
one round each way takes a few steps, one way after the other; the next round begins with the next
way. Tables show medians, and in brackets the quartiles. Each table has one way twice: their
difference is noise.

Peers are taken where they are installed: Flax, Tokamax, and PyTorch, eager, in the same process.
"""

import argparse  # not tyro: this file runs where there is nothing but JAX
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory as well

import jax
import jax.numpy as jnp
import numpy as np

import jaxnorm
from jaxnorm.core.kernels import rows_gpu

REPOSITORY = Path(__file__).parent.parent
EPSILON = 1e-6
GROUPS = 32
TIMES_X = {"layer": 5, "rms": 5, "group": 5, "instance": 5, "batch": 8}
SHAPES = {
    "gpu": {"rows": (8, 4096, 4096), "images": (128, 56, 56, 256), "layers": (32, 28, 28, 128)},
    "cpu": {"rows": (2, 16, 128), "images": (4, 5, 6, 64), "layers": (4, 4, 4, 32)},
}
BATCH_NORMS = 32


@dataclasses.dataclass(frozen=True)
class Options:
    """What to report."""

    platform: str
    methods: tuple[str, ...]
    dtypes: tuple[str, ...]
    rounds: int
    steps: int
    out: Path | None


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to take a step: `run()` starts one and returns its results, `wait` awaits them."""

    name: str
    run: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready
    layout: Callable[[Any], np.ndarray] = np.asarray
    """Of results, to compare them."""


# What is measured: each takes (x, scale, bias), with features last.

OURS: dict[str, Callable[..., jax.Array]] = {
    "layer": partial(jaxnorm.layer_norm, epsilon=EPSILON),
    "rms": lambda x, scale, bias: jaxnorm.rms_norm(x, scale, epsilon=EPSILON),
    "group": partial(jaxnorm.group_norm, num_groups=GROUPS, epsilon=EPSILON),
    "instance": lambda *args: jaxnorm.instance_norm(*args, epsilon=EPSILON)[0],
    "batch": lambda *args: jaxnorm.batch_norm(*args, epsilon=EPSILON)[0],
}


def by_kernel(method: str, interpret: bool) -> Callable[..., jax.Array]:
    """The kernels for rows, both ways."""
    use_mean = method == "layer"

    def forward(x, scale, bias):
        rows = x.reshape(-1, x.shape[-1])
        bias = bias if use_mean else None
        y, mean, var = rows_gpu.forward(
            rows,
            scale,
            bias,
            epsilon=EPSILON,
            use_mean=use_mean,
            dtype=x.dtype,
            interpret=interpret,
        )
        return y.reshape(x.shape), (rows, scale, mean, var)

    def backward(kept, dy):
        rows, scale, mean, var = kept
        rstd = jax.lax.rsqrt(var + EPSILON)
        dys = dy.reshape(rows.shape)
        options = dict(with_bias=use_mean, interpret=interpret)
        dx, dscale, dbias = rows_gpu.backward(rows, scale, mean, rstd, dys, **options)
        return dx.reshape(dy.shape), dscale, jnp.zeros_like(scale) if dbias is None else dbias

    normalize = jax.custom_vjp(lambda *args: forward(*args)[0])
    normalize.defvjp(forward, backward)
    return normalize


def by_flax(method: str, dtype: str) -> dict[str, Callable[..., jax.Array]]:
    """Flax Linen's layers, with each of its formulas for the variance."""
    if importlib.util.find_spec("flax") is None:
        return {}
    from flax import linen as nn

    options: dict[str, Any] = dict(epsilon=EPSILON, dtype=jnp.dtype(dtype))
    layer, more = {
        "layer": (nn.LayerNorm, {}),
        "rms": (nn.RMSNorm, {}),
        "group": (nn.GroupNorm, dict(num_groups=GROUPS)),
        "instance": (nn.InstanceNorm, {}),
        "batch": (nn.BatchNorm, dict(use_running_average=False)),
    }[method]

    def call(module, x, scale, bias):
        variables = {"params": {"scale": scale} | ({} if method == "rms" else {"bias": bias})}
        if method == "batch":
            stats = {"mean": jnp.zeros_like(scale), "var": jnp.ones_like(scale)}
            return module.apply(variables | {"batch_stats": stats}, x, mutable=["batch_stats"])[0]
        return module.apply(variables, x)

    if method == "rms":
        return {"Flax": partial(call, layer(**options, **more))}
    return {
        f"Flax, {name}": partial(call, layer(**options, **more, use_fast_variance=fast))
        for name, fast in (("fast variance", True), ("two passes", False))
    }


def by_tokamax(method: str) -> dict[str, Callable[..., jax.Array]]:
    """Tokamax, with the implementation that it chooses."""
    if method not in ("layer", "rms") or importlib.util.find_spec("tokamax") is None:
        return {}
    import tokamax  # pyright: ignore[reportMissingImports]

    def call(x, scale, bias):
        bias = bias if method == "layer" else None
        options = dict(epsilon=EPSILON, subtract_mean=method == "layer")
        return tokamax.layer_norm(x, scale, bias, **options)

    return {"Tokamax": call}


def stepping(name: str, normalize: Callable[..., jax.Array], values: Any) -> Way:
    """A step of a JAX function: the result and all gradients."""

    @jax.jit
    def step(x, scale, bias, dy):
        y, pullback = jax.vjp(normalize, x, scale, bias)
        # Otherwise XLA computes y and dx in one go, which no model lets it do.
        y, dy = jax.lax.optimization_barrier((y, dy))
        return y, *pullback(dy)

    return Way(name, lambda: step(*values))


def by_torch(method: str, dtype: str, values: Any, on_gpu: bool) -> list[Way]:
    """PyTorch's functions. Images have its memory format with features last."""
    if importlib.util.find_spec("torch") is None:
        return []
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

    if on_gpu and not torch.cuda.is_available():
        return []
    device = "cuda" if on_gpu else "cpu"
    images = values[0].ndim == 4

    def tensor(value, kind):
        there = torch.from_numpy(np.array(value, np.float32)).to(device, getattr(torch, kind))
        return there.permute(0, 3, 1, 2) if images and there.ndim == 4 else there

    x, dy = (tensor(value, dtype).requires_grad_() for value in (values[0], values[3]))
    # Its row norms want parameters of the dtype of x.
    kind = dtype if method in ("layer", "rms") else "float32"
    scale, bias = (tensor(value, kind).requires_grad_() for value in values[1:3])
    shape = tuple(scale.shape)
    params = [scale] if method == "rms" else [scale, bias]
    call = {
        "layer": lambda: F.layer_norm(x, shape, scale, bias, EPSILON),
        "rms": lambda: F.rms_norm(x, shape, scale, EPSILON),
        "group": lambda: F.group_norm(x, GROUPS, scale.to(x.dtype), bias.to(x.dtype), EPSILON),
        "instance": lambda: F.instance_norm(
            x, weight=scale.to(x.dtype), bias=bias.to(x.dtype), eps=EPSILON
        ),
        "batch": lambda: F.batch_norm(x, None, None, scale, bias, training=True, eps=EPSILON),
    }[method]

    def run():
        y = call()
        return y, *torch.autograd.grad(y, [x, *params], dy)

    def layout(value):
        value = value.permute(0, 2, 3, 1) if images and value.ndim == 4 else value
        return value.detach().float().cpu().numpy()

    wait = (lambda _: torch.cuda.synchronize()) if on_gpu else (lambda _: None)
    return [Way("PyTorch, eager", run, wait, layout)]


# Measuring


def rounds_of(ways: list[Way], options: Options) -> list[list[float]]:
    """Seconds a step, for each way and round. Each round begins with another way."""
    seconds: list[list[float]] = [[] for _ in ways]
    for way in ways:
        way.wait(way.run())
    for turn in range(options.rounds):
        for place in range(len(ways)):
            at = (turn + place) % len(ways)
            begin = time.perf_counter()
            results = ()
            for _ in range(options.steps):  # only the last results are kept
                results = ways[at].run()
            ways[at].wait(results)
            seconds[at].append((time.perf_counter() - begin) / options.steps)
    return seconds


def difference(way: Way, reference: Way) -> float:
    """The largest difference of any result, over the largest number in it; of the first example."""
    worst = 0.0
    # Not every way has a gradient of a bias in RMS norm.
    for one, other in zip(way.run(), reference.run(), strict=False):
        if one.ndim > 1:
            one, other = one[:1], other[:1]
        one, other = (np.float64(w.layout(v)) for w, v in ((way, one), (reference, other)))
        worst = max(worst, float(np.abs(one - other).max() / (1e-30 + np.abs(other).max())))
    return worst


def spread(values: Iterable[float], form: str) -> str:
    """The median, and in brackets the quartiles."""
    low, middle, high = np.quantile(list(values), [0.25, 0.5, 0.75])
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def drawn(shape: tuple[int, ...], dtype: str) -> tuple[jax.Array, ...]:
    """x, scale, bias and dy."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, dy = (1 + jax.random.normal(key, shape, dtype) for key in keys[:2])
    scale, bias = (1 + jax.random.normal(key, shape[-1:]) / 8 for key in keys[2:])
    return jax.block_until_ready((x, scale, bias, dy))


HEADINGS = ("way", "ms", "share of a copy", "times jaxnorm's time", "differs by")


def layer_table(method: str, dtype: str, options: Options) -> list[str]:
    """One layer in all ways."""
    on_gpu = options.platform == "gpu"
    shape = SHAPES[options.platform]["rows" if method in ("layer", "rms") else "images"]
    values = drawn(shape, dtype)
    functions = {"jaxnorm": OURS[method], "jaxnorm, once more": OURS[method]}
    if method in ("layer", "rms"):
        functions["jaxnorm's kernel"] = by_kernel(method, interpret=not on_gpu)
    functions |= by_flax(method, dtype) | by_tokamax(method)
    ways = [stepping(name, function, values) for name, function in functions.items()]
    ways += by_torch(method, dtype, values, on_gpu)
    differences = [difference(way, ways[0]) for way in ways]

    negate = jax.jit(jnp.negative)
    *seconds, copying = rounds_of([*ways, Way("copy", lambda: negate(values[0]))], options)
    per_byte = np.array(copying) / (2 * values[0].nbytes)
    floor = TIMES_X[method] * values[0].nbytes * per_byte
    size = "x".join(map(str, shape))
    lines = [f"## {method} norm, {dtype}, {size}\n"]
    rate = spread(1e-12 / per_byte, ".2f")
    lines += [f"A copy moves {rate} TB/s; the step is given {TIMES_X[method]} times x.\n"]
    lines += [f"| {' | '.join(HEADINGS)} |", "|---" + "|--:" * 4 + "|"]
    for way, took, differs in zip(ways, seconds, differences, strict=True):
        cells = (
            way.name,
            spread(np.array(took) * 1e3, ".3f"),
            spread(floor / took, ".0%"),
            spread(np.array(took) / seconds[0], ".2f"),
            f"{differs:.0e}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def conditional_table(options: Options) -> list[str]:
    """Many batch norms in one program: does the host wait for each decision about a second pass?"""
    shape = SHAPES[options.platform]["layers"]
    values = drawn(shape, "bfloat16")

    def stack(shift, x, scale, bias):
        for _ in range(BATCH_NORMS):
            x = jaxnorm.batch_norm(jax.nn.relu(x), scale, bias, shift=shift)[0]
        return x

    ways = [
        stepping("one pass, and a branch with a second (`shift=0.0`)", partial(stack, 0.0), values),
        stepping("the same, once more", partial(stack, 0.0), values),
        stepping("always two passes (`shift=None`)", partial(stack, None), values),
    ]
    for name, call in by_flax("batch", "bfloat16").items():

        def theirs(x, scale, bias, call=call):
            for _ in range(BATCH_NORMS):
                x = call(jax.nn.relu(x), scale, bias)
            return x

        ways.append(stepping(name, theirs, values))
    seconds = rounds_of(ways, options)
    size = "x".join(map(str, shape))
    lines = [f"## {BATCH_NORMS} batch norms in one program, bfloat16, {size}\n"]
    lines += ["Forward and backward; microseconds for each layer.\n"]
    lines += ["| way | microseconds | times the first |", "|---|--:|--:|"]
    for way, took in zip(ways, seconds, strict=True):
        each = spread(np.array(took) * 1e6 / BATCH_NORMS, ".1f")
        lines.append(f"| {way.name} | {each} | {spread(np.array(took) / seconds[0], '.2f')} |")
    return [*lines, ""]


# Reporting


def versions() -> str:
    """What the numbers depend on."""
    found = [f"Python {platform.python_version()}"]
    for name in ("jax", "jaxlib", "flax", "tokamax", "torch"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    git = ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        commit = ""
    return ", ".join([*found, f"jaxnorm {f'at {commit}' if commit else 'of no known commit'}"])


def parsed() -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--platform", choices=tuple(SHAPES), default="gpu")
    parser.add_argument("--methods", nargs="+", choices=tuple(TIMES_X), default=tuple(TIMES_X))
    parser.add_argument("--dtypes", nargs="+", default=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, help="how many times each way is timed")
    parser.add_argument("--steps", type=int, help="how many steps each time")
    parser.add_argument("--out", type=Path, help="the report; default: benchmarks/results/")
    given = parser.parse_args()
    small = given.platform == "cpu"
    return Options(
        given.platform,
        tuple(given.methods),
        tuple(given.dtypes),
        given.rounds or (3 if small else 15),
        given.steps or (1 if small else 20),
        given.out,
    )


def main() -> None:
    """Measures everything, then writes and prints the report."""
    options = parsed()
    if jax.default_backend() != options.platform:
        sys.exit(
            f"gpu_report: JAX runs on {jax.default_backend()}, not on {options.platform}. "
            "Install its GPU form, pip install 'jax[cuda13]', or try the report on small arrays: "
            "JAX_PLATFORMS=cpu python benchmarks/gpu_report.py --platform cpu"
        )
    date = datetime.date.today().isoformat()
    device = jax.devices()[0].device_kind
    lines = [
        f"# Normalization on {device}, {date}\n",
        f"{versions()}.\n",
        f"    {' '.join(['python benchmarks/gpu_report.py', *sys.argv[1:]])}\n",
        (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2],
    ]
    if options.platform == "cpu":
        lines.append("Small arrays on a CPU, the kernels interpreted: these times say nothing.\n")
    name = f"{date}-{options.platform}-bandwidth.md"
    out = options.out or REPOSITORY / "benchmarks" / "results" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    tables = [
        partial(layer_table, method, dtype, options)
        for method in options.methods
        for dtype in options.dtypes
    ]
    if "batch" in options.methods:
        tables.append(partial(conditional_table, options))
    for measure in tables:
        lines += (table := measure())
        out.write_text("\n".join(lines))  # what there is, should the time run out
        print(*table, sep="\n", flush=True)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
