"""The report as Markdown: what was measured, in tables."""

import datetime
import math
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import machine, oracle
from benchmarks.cases import DTYPES, METHODS, STEPS
from benchmarks.goals import goals_of
from benchmarks.layers import LayerResult
from benchmarks.peers import FLAX, OURS, TORCH
from benchmarks.results import Results, mean_ratio
from benchmarks.timing import AGAIN, Quartiles, Times

BEGIN, END = "<!-- the latest figures -->", "<!-- until here -->"

HEAD = """# Speed, memory and overheads, {date}

{description}.
{versions}.

    {command}
{absent}
{begin}
"""

METHOD = """
Ratios are times of others over those of this library's Linen module: above 1, this library is
faster. In one round each way runs once, in an order that rotates, and as often inside a measurement
as to fill {shortest}; shown are medians of the ratios in a round, with their quartiles in brackets.
"Flax again" is what Flax does, timed as a further way: its ratio to Flax is the noise, here
{low:.2f} to {high:.2f}. {torch}All are asked for the same epsilon, momentum and groups, all
normalize the same numbers, and no parameters or statistics have to be moved or converted for them;
PyTorch and Equinox get images with their features next to the batch, as they want them.
"""
TORCH_APART = (
    "PyTorch was timed after the others in a process of its own, with as many threads, since its "
    "idle threads go on spinning: its ratios are over the median of ours, with quartiles of its "
    "own times. "
)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> list[str]:
    """A table whose first columns are words and the others numbers."""
    line = "|---" * words + "|--:" * (len(headings) - words) + "|"
    return ["", *(f"| {' | '.join(row)} |" for row in [headings]), line] + [
        f"| {' | '.join(row)} |" for row in rows
    ]


def number(value: float, form: str = ".2f") -> str:
    """A number, or a dash where there is none."""
    return "–" if math.isnan(value) else format(value, form)  # noqa: RUF001


def spread(ratio: Quartiles) -> str:
    """A median with its quartiles."""
    return f"{ratio.middle:.2f} ({ratio.low:.2f}, {ratio.high:.2f})"


def milliseconds(seconds: float) -> str:
    """Three digits of it, or seconds where these are many."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def ways_of(results: Sequence[LayerResult]) -> list[str]:
    """All that some case was timed in, besides this library's Linen module."""
    ways = dict.fromkeys(way for one in results for way in one.times.seconds)
    return [way for way in ways if way != OURS]


def mean_rows(results: Results, ways: Sequence[str]) -> list[list[str]]:
    """Geometric means over all cases of a step and a dtype."""
    kinds = [(step, dtype) for step in STEPS for dtype in DTYPES if results.chosen(step, dtype)]
    return [
        [f"{step}, {dtype}", *(number(mean_ratio(results.chosen(step, dtype), w)) for w in ways)]
        for step, dtype in kinds
    ]


def in_short(results: Results, picture: str) -> list[str]:
    """Goals, means and the picture: what the docs repeat."""
    goals = [[goal.aim, goal.found, goal.verdict] for goal in goals_of(results)]
    lines = table(["goal", "measured", ""], goals, words=3)
    ways = [way for way in ways_of(results.layers) if not way.endswith(AGAIN)]
    if ways:
        lines += ["", "Geometric means of their time over ours, one layer, all methods and sizes:"]
        lines += table(["step", *ways], mean_rows(results, ways))
    if picture:
        lines += ["", f"![Time of others over ours, by method]({picture})"]
    return lines


def layer_tables(results: Results) -> list[str]:
    """Every case, step by step and dtype by dtype."""
    lines = []
    for step in STEPS:
        for dtype in DTYPES:
            chosen = results.chosen(step, dtype)
            if not chosen:
                continue
            ways = ways_of(chosen)
            rows = [
                [
                    f"{one.case.method} {'x'.join(map(str, one.case.shape))}",
                    milliseconds(one.times.median(OURS)),
                    *(
                        spread(one.times.ratio(way, OURS)) if way in one.times.seconds else ""
                        for way in ways
                    ),
                ]
                for one in chosen
            ]
            for method in METHODS:
                part = [one for one in chosen if one.case.method == method]
                if len(part) > 1:
                    means = (number(mean_ratio(part, way)) for way in ways)
                    rows.append([f"**{method}, geometric mean**", "", *means])
            lines += ["", f"## One layer, {step} step, {dtype}"]
            lines += table(["case", OURS, *ways], rows)
    return lines


def further_tables(results: Results) -> list[str]:
    """Methods that no peer has."""
    rows = [
        [one.case.label, milliseconds(one.times.median(OURS)), f"{one.temporaries[OURS]:.2f}"]
        for one in results.further
    ]
    title = ["", "## One layer, training step, methods that no peer has"]
    return [*title, *table(["case", OURS, "temporaries / x"], rows)] if rows else []


def memory_tables(results: Results) -> list[str]:
    """Temporaries of training steps, and what is held for the backward pass."""
    lines = []
    if results.layers:
        names = [name for name in results.peers if name != TORCH]
        lines += ["", "## Memory of one layer", "", "Temporaries of a training step over bytes of "]
        lines[-1] += "x, as XLA counts them: besides arguments and results."
        rows = [
            [one.case.label, *(f"{one.temporaries[name]:.2f}" for name in names)]
            for one in results.chosen("training")
        ]
        lines += table(["case", *names], rows)
    if results.residuals:
        names = list(next(iter(results.residuals.values())))
        lines += ["", "Bytes that `jax.vjp` holds for the backward pass over bytes of x:"]
        rows = [
            [case.label, *(f"{held[name]:.2f}" for name in names)]
            for case, held in results.residuals.items()
        ]
        lines += table(["case", *names], rows)
    return lines


def model_tables(results: Results) -> list[str]:
    """Whole models."""
    if not results.models:
        return []
    rows = []
    for one in results.models:
        share = one.temporaries[OURS] / one.temporaries[FLAX]
        rows.append(
            [
                f"{one.name}, {one.dtype}",
                milliseconds(one.times.median(OURS)),
                *(spread(one.times.ratio(way, OURS)) for way in (FLAX, FLAX + AGAIN)),
                f"{one.temporaries[OURS] / 2**20:.1f} MiB, {share:.0%} of Flax's",
                f"{one.traced[OURS]:.2f} s, {one.traced[FLAX]:.2f} s",
                f"{one.compiled[OURS]:.2f} s, {one.compiled[FLAX]:.2f} s",
            ]
        )
    columns = ["model", OURS, "Flax", "Flax again", "temporaries"]
    columns += ["tracing: ours, Flax's", "compiling: ours, Flax's"]
    lines = ["", "## Whole models, training step", ""]
    lines += ["The same Linen model with the classes of the norms exchanged, and plain gradient "]
    lines[-1] += "descent. Tracing and compiling were timed once."
    return lines + table(columns, rows)


def overhead_tables(results: Results) -> list[str]:
    """Importing, tracing, compiling, calling without jit."""
    lines = []
    if results.imports.seconds:
        rows = [
            [f"`import {name}`", results.imports.quartiles(name).in_milliseconds()]
            for name in results.imports.seconds
        ]
        lines += ["", "## Importing, beyond `import jax`"]
        lines += table(["statement", "fresh process"], rows)

    def cells(times: Times) -> list[str]:
        medians = [milliseconds(times.median(name)) for name in (OURS, FLAX)]
        return [*medians, *(spread(times.ratio(name, FLAX)) for name in (OURS, FLAX + AGAIN))]

    headings = [OURS, "Flax", "ours over Flax's", "Flax's again over Flax's"]
    for title, part in (("Tracing and lowering", "traced"), ("Compiling", "compiled")):
        if results.stages:
            rows = [[one.name, *cells(getattr(one, part))] for one in results.stages]
            lines += ["", f"## {title} a training step, with empty caches"]
            lines += table(["model", *headings], rows)
    if results.eager:
        rows = [[f"{m}, {kind}", *cells(times)] for (m, kind), times in results.eager.items()]
        lines += ["", "## Calling a module without jit, in training, on a small input"]
        lines += table(["module", *headings], rows)
    if results.recompiles:
        rows = [[f"{name}, {kind}", str(n)] for (name, kind), n in results.recompiles.items()]
        lines += ["", "## Programs compiled between training steps"]
        lines += table(["library", "after the first step"], rows)
    return lines


def correctness_tables(results: Results) -> list[str]:
    """Whether all compute the same."""
    if not results.errors:
        return []
    lines = ["", "## Do all compute the same?", ""]
    lines += [
        "Output and gradient of the input in training against float64 of NumPy: largest difference "
        "over the largest value; in italics beyond what rounding explains "
        f"({oracle.TOLERANCE['float32']:.0e} in float32, {oracle.TOLERANCE['bfloat16']:.0e} in "
        "bfloat16). Also named: another dtype of the result than the input's."
    ]
    kinds = list(dict.fromkeys((method, dtype) for _, method, dtype in results.errors))
    rows = [[f"{m}, {d}", *(error_cell(results, p, m, d) for p in results.peers)] for m, d in kinds]
    lines += table(["case", *results.peers], rows)
    methods = [method for method, dtype in kinds if dtype == "float32" and method != "RMSNorm"]
    if methods:
        lines += ["", f"Output for an input of mean {oracle.OFFSET:.0e} and standard deviation 1 "]
        lines[-1] += "in float32; in italics where the variance is unstable."
        rows = [[m, *(offset_cell(results, p, m) for p in results.peers)] for m in methods]
        lines += table(["case", *results.peers], rows)
    return lines


def error_cell(results: Results, peer: str, method: str, dtype: str) -> str:
    """Errors of output and gradient."""
    errors = results.errors.get((peer, method, dtype))
    if errors is None:
        return ""
    text = f"{errors.output:.0e}, {errors.gradient:.0e}"
    text = text if oracle.agrees(errors, dtype) else f"*{text}*"
    other = results.widened.get((peer, method, dtype))
    return f"{text}, returns {other}" if other else text


def offset_cell(results: Results, peer: str, method: str) -> str:
    """Error far from zero."""
    errors = results.errors.get((peer, method, "float32"))
    if errors is None or errors.offset is None:
        return ""
    text = f"{errors.offset:.0e}" if math.isfinite(errors.offset) else "not a number"
    return text if oracle.is_stable(errors) else f"*{text}*"


def report(results: Results, description: str, picture: str) -> str:
    """The whole page; `picture` is the address of the picture from it, or empty."""
    absent = ", ".join(results.absent)
    low, high = results.noise()
    head = HEAD.format(
        date=datetime.date.today().isoformat(),
        description=description,
        versions=machine.versions(),
        command=" ".join(["python -m benchmarks", *sys.argv[1:]]),
        absent=f"\nNot installed, and so not measured: {absent}.\n" if absent else "",
        begin=BEGIN,
    )
    torch = TORCH_APART if TORCH in results.peers else ""
    method = METHOD.format(low=low, high=high, torch=torch, shortest=milliseconds(results.shortest))
    lines = [
        head.rstrip(),
        *in_short(results, picture),
        "",
        END,
        "",
        textwrap.fill(method.strip(), 100),
        *layer_tables(results),
        *further_tables(results),
        *model_tables(results),
        *memory_tables(results),
        *overhead_tables(results),
        *correctness_tables(results),
    ]
    return "\n".join(lines) + "\n"


def file_name(date: str, platform: str, quick: bool = False) -> str:
    """Of a report; further reports lie in the same folder, and have other endings."""
    return f"{date}-{platform}-{'quick' if quick else 'benchmarks'}.md"


def latest(folder: Path, platform: str = "cpu") -> Path | None:
    """The newest report of `python -m benchmarks` on a kind of device, quick ones aside."""
    return max(folder.glob(file_name("*", platform)), default=None)
