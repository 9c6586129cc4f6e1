"""Memory: the largest scanned transformer that fits a 16 GB TPU.

A norm keeps something of its input for the backward pass. In bfloat16 networks Flax's layers keep
float32 copies of it; those of jaxnorm keep the input as it is, and one or two numbers a token.
Under `nn.scan` what is kept is stacked over the blocks, so the compiler cannot drop it.

This script compiles the training step of a language model on bytes for a TPU v5e, of whose 16 GiB a
program may have 15.75. libtpu compiles for a TPU that is not there, always in the same way, and
refuses a program that does not fit. So the script finds the largest number of blocks that compiles,
with Flax's norms, with jaxnorm's, and without any. Nothing is run. What is drawn for a program that
compiles are its arguments, results and temporaries by `memory_analysis`, where what the step takes
over counts once. This sum can be some percent above what the compiler holds against the limit. For
a refused one it is what the refusal names, before the compiler has tried to save.

The model is of the usual kind: causal attention and a perceptron of width 4x, each behind a norm
and beside a shortcut, in bfloat16 with parameters in float32, Adam in float32, and the old state
handed over to the step. The scores of attention are recomputed in the backward pass, as its fast
implementations do, so that they do not hide the rest. Where whole blocks are recomputed, by
`nn.remat`, neither library's norms keep anything from block to block, and there is little to gain.

How to run:

    pip install 'jax[tpu]'
    python examples/reproductions/transformer_memory.py
    python examples/reproductions/transformer_memory.py --quick
    python examples/reproductions/transformer_memory.py --norms RMSNorm --width 2048 --sequences 4
"""

import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from matplotlib.figure import Figure
from study import (
    COLORS,
    DASHES,
    PageOptions,
    Report,
    UsageError,
    conclude,
    each,
    figure_of,
    run,
    tidy,
)

from jaxnorm import linen as jnn

AVAILABLE = 15.75
"""GiB of the chip's memory that a program may have; the compiler names it when it refuses."""

VOCABULARY = 256
"""Bytes."""

Norm = Literal["LayerNorm", "RMSNorm"]
WHOSE = ("Flax", "jaxnorm")
NONE = "no norms"
LAYERS: dict[str, Callable[..., Any]] = {
    "LayerNorm, Flax": nn.LayerNorm,
    "LayerNorm, jaxnorm": jnn.LayerNorm,
    "RMSNorm, Flax": nn.RMSNorm,
    "RMSNorm, jaxnorm": jnn.RMSNorm,
    NONE: lambda dtype: lambda x: x,
}


@dataclass(frozen=True)
class Options(PageOptions):
    """Find the largest transformer whose training step fits a TPU v5e, compiled without one."""

    norms: tuple[Norm, ...] = ("LayerNorm", "RMSNorm")
    """The kinds of norm to try, with the layers of Flax and of jaxnorm."""

    width: int = 1024
    """Features of a token; each head of attention has 128 of them."""

    sequences: int = 8
    """Sequences in a batch."""

    length: int = 1024
    """Tokens in a sequence."""

    def check(self) -> None:
        """Refuses impossible sizes, and a machine without the compiler."""
        super().check()
        if not self.norms:
            raise UsageError("--norms needs LayerNorm, RMSNorm, or both")
        if self.width < 128 or self.width % 128:
            raise UsageError(f"--width must be a multiple of 128, not {self.width}")
        if min(self.sequences, self.length) < 1:
            raise UsageError("--sequences and --length must be at least 1")
        if importlib.util.find_spec("libtpu") is None:
            raise UsageError(
                "found no libtpu, the compiler for TPUs, which needs no TPU; install the one that "
                "belongs to this JAX: pip install 'jax[tpu]'"
            )

    @property
    def kinds(self) -> list[str]:
        """Names of `LAYERS`."""
        norms = self.norms[:1] if self.quick else self.norms
        found = [f"{norm}, {whose}" for norm in norms for whose in WHOSE]
        return found if self.quick else [*found, NONE]


@jax.checkpoint
def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Causal attention that keeps its inputs alone."""
    return jax.nn.dot_product_attention(query, key, value, is_causal=True)


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm and beside a shortcut."""

    norm: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Maps tokens [sequences, length, width] to such tokens, as a step of a scan."""
        *tokens, width = x.shape
        dense = partial(nn.Dense, use_bias=False, dtype=jnp.bfloat16)
        together = dense(3 * width)(self.norm(dtype=jnp.bfloat16)(x))
        parts = jnp.split(together.reshape(*tokens, -1, 128), 3, axis=-2)
        x = x + dense(width)(attend(*parts).reshape(x.shape))
        hidden = nn.gelu(dense(4 * width)(self.norm(dtype=jnp.bfloat16)(x)))
        return x + dense(width)(hidden), None


class Transformer(nn.Module):
    """A language model on bytes; its blocks are one `nn.scan`."""

    norm: Callable[..., Any]
    blocks: int
    width: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps bytes [sequences, length] to logits of the next ones."""
        x = nn.Embed(VOCABULARY, self.width, dtype=jnp.bfloat16)(tokens)
        along: Any = {"params": 0}
        split: Any = {"params": True}
        blocks = nn.scan(Block, variable_axes=along, split_rngs=split, length=self.blocks)
        x, _ = blocks(self.norm)(x, None)
        x = self.norm(dtype=jnp.bfloat16)(x)
        return nn.Dense(VOCABULARY, dtype=jnp.bfloat16)(x).astype(jnp.float32)


def step_of(model: nn.Module) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """How the state of a training starts, and one step of it."""
    optimizer = optax.adam(1e-3)

    def start(tokens: jax.Array) -> Any:
        params = model.init(jax.random.key(0), tokens)["params"]
        return params, optimizer.init(params)

    def step(state: Any, tokens: jax.Array, targets: jax.Array) -> tuple[Any, jax.Array]:
        def loss_of(params: Any) -> jax.Array:
            logits: Any = model.apply({"params": params}, tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        params, moments = state
        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, moments = optimizer.update(gradients, moments)
        return (optax.apply_updates(params, updates), moments), loss

    return start, step


class Need(NamedTuple):
    """What a program needs.

    Attributes:
        memory: GiB, of arguments, results and temporaries; what is taken over counts once.
        fits: whether the compiler took it.
    """

    memory: float
    fits: bool


def chip() -> SingleDeviceSharding:
    """One chip of a TPU v5e that is not there."""
    os.environ.update(
        # libtpu asks no machine which TPU it is, and shares itself with other processes.
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    jax.config.update("jax_platforms", "cpu")  # no TPU is to be looked for
    topology = topologies.get_topology_desc("v5e:2x2", platform="tpu")
    return SingleDeviceSharding(topology.devices[0])


def need_of(kind: str, blocks: int, options: Options) -> Need:
    """Compiles the training step with so many blocks."""
    place = chip()

    def array(like: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=place)

    start, step = step_of(Transformer(LAYERS[kind], blocks, options.width))
    tokens = jax.ShapeDtypeStruct((options.sequences, options.length), jnp.int32)
    state = jax.tree.map(array, jax.eval_shape(start, tokens))
    lowered = jax.jit(step, donate_argnums=0).lower(state, array(tokens), array(tokens))
    try:
        found: Any = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        return Need(refused(str(error), state), fits=False)
    total = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return Need((total - found.alias_size_in_bytes) / 2**30, fits=True)


def refused(message: str, state: Any) -> float:
    """GiB that the compiler's refusal speaks of; it counts the state or leaves it out."""
    together = re.search(r"Used ([\d.]+)([MGT]) of", message)
    temporaries = re.search(r"temporaries \(([\d.]+)([MGT])\) exceeds", message)
    found = together or temporaries
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        raise RuntimeError(f"the compiler failed, but not for want of memory: {message}")
    memory = float(found[1]) * {"M": 1 / 1024, "G": 1.0, "T": 1024.0}[found[2]]
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) / 2**30
    return memory if together else memory + held


Needs = dict[int, Need]
"""By the number of blocks."""


def line_through(needs: Needs) -> tuple[float, float]:
    """GiB for each block, and for what does not depend on their number.

    By what was refused, if that is enough: near the limit the compiler saves memory where it can.
    """
    refusals = {blocks: one for blocks, one in needs.items() if not one.fits}
    points = refusals if len(refusals) > 1 else needs
    slope, constant = np.polyfit(list(points), [one.memory for one in points.values()], 1)
    return float(slope), float(constant)


def largest(measure: Callable[[int], Need], needs: Needs) -> int:
    """The largest number of blocks that fits; 0 if none does.

    A refusal takes the compiler seconds, a program much longer. So the search comes from above,
    from more than the line through `needs` promises: near the limit the compiler saves memory where
    it can. `needs` gets what was measured on the way.
    """

    def fits(blocks: int) -> bool:
        if blocks not in needs:
            needs[blocks] = measure(blocks)
        return needs[blocks].fits

    slope, constant = line_through(needs)
    blocks = max(int(1.15 * (AVAILABLE - constant) / slope), 0) + 1
    while fits(blocks):
        blocks += 1
    while blocks and not fits(blocks):
        blocks -= 1
    return blocks


def first_points(options: Options) -> tuple[int, int]:
    """Two numbers of blocks for which the compiler refuses, which takes it the least time.

    A block has 12 width^2 parameters, in float32 with two moments, and keeps at least 16 arrays of
    the size of its input: those that its matrix products need.
    """
    parameters = 12 * options.width**2
    kept = 16 * options.sequences * options.length * options.width
    most = int(AVAILABLE * 2**30 / (12 * parameters + 2 * kept)) + 1
    return most + 1, 2 * most + 1


class Found(NamedTuple):
    """What was found for one kind of norm.

    Attributes:
        largest: the number of blocks that fit.
        needs: all that was compiled.
    """

    largest: int
    needs: Needs


def found_of(kind: str, options: Options) -> Found:
    """Compiles until the largest number of blocks is known; in a quick run, as the line says."""
    needs = {blocks: need_of(kind, blocks, options) for blocks in first_points(options)}
    if options.quick:
        slope, constant = line_through(needs)
        return Found(int((AVAILABLE - constant) / slope), needs)
    return Found(largest(lambda blocks: need_of(kind, blocks, options), needs), needs)


def main(options: Options) -> Report:
    """Compiles all transformers, and compares the largest."""
    options.check()
    found = {kind: found_of(kind, options) for kind in each(options.kinds, "compiling")}
    tokens = options.sequences * options.length
    report = Report(
        name="transformer_memory",
        about=__doc__ or "",
        setting=f"TPU v5e by libtpu {version('libtpu')}, {AVAILABLE} GiB; blocks of width "
        f"{options.width}, {options.sequences} sequences of {options.length} tokens, bfloat16, "
        "Adam in float32",
        headings=[
            "norms",
            "largest number of blocks",
            "GiB for one more",
            "bytes a feature of a token",
        ],
        rows=[row_of(kind, one, options.width, tokens) for kind, one in found.items()],
        findings=(),
        picture=picture_of(found, options),
        alt="Memory of a training step against the number of blocks, with the limit of the chip, "
        "and the largest number of blocks that fits, for each kind of norm",
        notes=notes_of(found),
    )
    return conclude(report, options)


def row_of(kind: str, found: Found, width: int, tokens: int) -> list[str]:
    """Of the table."""
    slope, _ = line_through(found.needs)
    # Parameters, two moments and gradients are there for each block as well, whatever the norms.
    kept = slope * 2**30 - 16 * 12 * width**2
    return [kind, str(found.largest), f"{slope:.3f}", f"{kept / tokens / width:.1f}"]


def notes_of(found: dict[str, Found]) -> list[str]:
    """What the numbers say, for each norm with both libraries."""
    notes = []
    for norm in dict.fromkeys(kind.partition(",")[0] for kind in found if kind != NONE):
        flax, ours = (found[f"{norm}, {whose}"].largest for whose in WHOSE)
        more = f"{ours / flax - 1:+.0%}" if flax else "no fewer"
        notes.append(
            f"With {norm}, {flax} blocks fit with Flax's layers and {ours} with jaxnorm's ({more})."
        )
    if NONE in found:
        notes.append(f"Without norms, {found[NONE].largest} blocks fit.")
    return notes


def picture_of(found: dict[str, Found], options: Options) -> Figure:
    """Memory against blocks, and bars of the largest numbers."""
    sizes = f"width {options.width}, {options.sequences} x {options.length} tokens"
    figure, (left, right) = figure_of(2, f"Training a scanned transformer on a TPU v5e, {sizes}")
    end = 1.4 * max(one.largest for one in found.values()) + 1
    for number, (kind, one) in enumerate(found.items()):
        slope, constant = line_through(one.needs)
        x = np.array([0.0, end])
        color, dashes = COLORS[number], DASHES[number]
        left.plot(x, slope * x + constant, color=color, linestyle=dashes, label=kind)
        for blocks, need in one.needs.items():
            if blocks <= end:
                face = color if need.fits else "none"
                left.plot(blocks, need.memory, "o", color=color, markerfacecolor=face)
        right.barh(number, one.largest, color=color)
        right.annotate(
            str(one.largest), (one.largest, number), (4, 0), va="center", textcoords="offset points"
        )
    left.axhline(AVAILABLE, color="black")
    left.annotate(
        f"limit: {AVAILABLE} GiB",
        (0, AVAILABLE),
        (4, 4),
        textcoords="offset points",
    )
    left.set(xlabel="blocks", ylabel="GiB for a training step", xlim=(0, end))
    left.set_ylim(0, 1.5 * AVAILABLE)
    left.set_title("filled: compiled; hollow: refused")
    right.set_yticks(range(len(found)), list(found))
    right.invert_yaxis()
    right.set(xlabel="blocks", title="largest number that fits")
    tidy(figure)
    return figure


if __name__ == "__main__":
    run(main, Options)
