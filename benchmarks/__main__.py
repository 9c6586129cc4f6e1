"""Measures this library beside others, then writes a report with a picture.

    python -m benchmarks            about ten minutes on two cores, into benchmarks/results/
    python -m benchmarks --quick    under a minute: does everything once, tells nothing
    python -m benchmarks --docs     and shows the figures in docs/benchmarks.md

A step of one layer: training is its forward pass, its backward pass for x and for the parameters
from a given gradient of the output, and the new running statistics; evaluation is the forward pass
alone. Peers that are not installed are named in the report. The optional extra `oracle` has them.
"""

import datetime
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import tyro
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress

from benchmarks import cases, layers, machine, models, overheads, peers, torch_worker, whole_models
from benchmarks.docs import RESULTS, publish
from benchmarks.peers import NAMES, TORCH, Peer
from benchmarks.picture import draw
from benchmarks.report import file_name, in_short, report
from benchmarks.results import Results
from benchmarks.timing import Effort

Part = Literal["layers", "models", "overheads"]
PARTS: tuple[Part, ...] = ("layers", "models", "overheads")


@dataclass(frozen=True)
class Options:
    """What to measure, and where to write it."""

    parts: tuple[Part, ...] = PARTS
    """Single layers with their memory, whole models, or import, tracing, compiling and calls."""

    methods: tuple[str, ...] = tuple(cases.METHODS)
    """Norms by their names."""

    sizes: tuple[str, ...] = tuple(cases.SIZES)
    """Sizes of inputs; each method takes those that it meets in models."""

    dtypes: tuple[str, ...] = cases.DTYPES
    """Dtypes of inputs; parameters and statistics are float32 where the library allows."""

    peers: tuple[str, ...] = NAMES
    """Libraries to compare with, as far as they are installed; jaxnorm itself is always there."""

    rounds: int = 15
    """Rounds of timing, at most; two or more."""

    seconds: float = 3.0
    """Seconds after which a case begins no further round, if it had five."""

    quick: bool = False
    """Small sizes, few rounds, the first method and the last dtype, to see that all works."""

    docs: bool = False
    """Show the figures in docs/benchmarks.md."""

    out: Path | None = None
    """The report; without it benchmarks/results/ with date and device. The picture lies beside."""


def check(options: Options) -> None:
    """Ends the program at names that do not exist, and at what would be measured in vain."""
    for word, names, known in (
        ("methods", options.methods, cases.METHODS),
        ("sizes", options.sizes, cases.SIZES),
        ("dtypes", options.dtypes, cases.DTYPES),
        ("peers", options.peers, NAMES),
    ):
        unknown = sorted({*names} - {*known})
        if unknown:
            sys.exit(f"benchmarks: --{word} {', '.join(unknown)}: choose of {', '.join(known)}.")
    if options.rounds < 2:
        sys.exit(f"benchmarks: --rounds {options.rounds}: quartiles need at least 2 rounds.")
    if options.quick:
        for word in ("rounds", "seconds", "docs"):
            if getattr(options, word) != getattr(Options, word):
                sys.exit(
                    f"benchmarks: --{word} with --quick: a quick run has its own few rounds, and "
                    "its numbers tell nothing. Leave out one of the two."
                )


def efforts(options: Options) -> dict[str, Effort]:
    """How long to measure a case of each kind."""
    if options.quick:
        brief = Effort(rounds=3, seconds=0.1, fewest=3, shortest=1e-4)
        return dict.fromkeys(("training", "evaluation", "models", "eager", "torch"), brief)
    return {
        "training": Effort(options.rounds, options.seconds),
        "evaluation": Effort(options.rounds, options.seconds / 4),
        "models": Effort(options.rounds, 2 * options.seconds),
        "eager": Effort(2 * options.rounds, options.seconds / 4),
        "torch": Effort(options.rounds, options.seconds / 8),
    }


def abridged(options: Options) -> Options:
    """What a quick run measures of what was chosen: the first method, and the last dtype."""
    return replace(options, methods=options.methods[:1], dtypes=options.dtypes[-1:])


def chosen_cases(options: Options) -> list[cases.Case]:
    """The cases of single layers; a quick run takes the smallest size of each method."""
    found = cases.cases(options.methods, options.sizes, options.dtypes)
    if not options.quick:
        return found
    smallest = {(case.method, case.dtype): case for case in found}
    return list(smallest.values())


def measure_layers(results: Results, chosen: list[Peer], options: Options, bar: Progress) -> None:
    """Errors, times and memory of single layers."""
    effort, todo = efforts(options), chosen_cases(options)
    task = bar.add_task("layers", total=len(todo))
    for case in todo:
        bar.update(task, description=case.label)
        results.residuals[case] = {peer.name: layers.residuals(peer, case) for peer in chosen}
        for step in cases.STEPS:
            results.layers.append(layers.measure(case, step, chosen, effort[step]))
        bar.advance(task)
    for method, dtype in dict.fromkeys((case.method, case.dtype) for case in todo):
        bar.update(task, description=f"errors of {method} {dtype}")
        for peer in chosen:
            key = peer.name, method, dtype
            results.errors[key] = layers.errors(peer, method, dtype)
            result = layers.result_dtype(peer, method, dtype)
            if result != dtype:
                results.widened[key] = result
    if not options.quick:
        for dtype in options.dtypes:
            bar.update(task, description=f"further methods {dtype}")
            found = layers.measure_further(cases.FURTHER_SIZE, dtype, chosen, effort["training"])
            results.further += found


def measure_models(results: Results, options: Options, bar: Progress) -> None:
    """Whole models, those whose norm was chosen."""
    some = models.QUICK_MODELS if options.quick else models.MODELS
    todo = [
        (name, dtype)
        for dtype in options.dtypes
        for name, model in some.items()
        if options.quick or model.norm in options.methods
    ]
    task = bar.add_task("models", total=len(todo))
    for name, dtype in todo:
        bar.update(task, description=f"{name} {dtype}")
        effort = efforts(options)["models"]
        results.models.append(whole_models.measure(name, some[name], dtype, effort))
        bar.advance(task)


def measure_overheads(results: Results, options: Options, bar: Progress) -> None:
    """Importing, tracing, compiling, calls without jit."""
    rounds = 2 if options.quick else 3
    task = bar.add_task("calls without jit", total=4)
    results.eager = overheads.eager_times(options.methods, efforts(options)["eager"])
    results.recompiles = overheads.recompiles()
    bar.update(task, description="tracing and compiling one layer", advance=1)
    results.stages = overheads.stages_of_layers(options.methods, rounds)
    bar.update(task, description="tracing and compiling many norms", advance=1)
    deep = [(kind, method) for kind, method in overheads.DEEP if method in options.methods]
    layers, deep = (1, deep[:1]) if options.quick else (50, deep)
    results.deep = overheads.stages_of_models(layers, 2, deep)  # each takes seconds
    results.stages = results.stages + results.deep
    bar.update(task, description="importing", advance=1)
    results.imports = overheads.import_times(2 if options.quick else 5)
    bar.advance(task)


def measure_torch(results: Results, options: Options, bar: Progress) -> None:
    """PyTorch, when all others are done."""
    task = bar.add_task(TORCH, total=1)
    todo = chosen_cases(options)
    errors, times = torch_worker.ask(todo, machine.threads(), efforts(options)["torch"])
    results.peers.append(TORCH)
    for (method, dtype), found in errors.items():
        results.errors[TORCH, method, dtype] = found
    for one in results.layers:
        one.times.add_apart(TORCH, times[one.case, one.step])
    bar.advance(task)


def measure(options: Options, bar: Progress) -> Results:
    """Runs all chosen parts."""
    wanted = (peers.OURS, *options.peers)
    chosen = peers.found(wanted)
    with_torch = TORCH in wanted and peers.is_installed("torch")
    names = [peer.name for peer in chosen]
    absent = {*wanted} - {*names} - ({TORCH} if with_torch else set())
    results = Results(
        peers=names,
        absent=[name for name in NAMES if name in absent],
        platform=jax.default_backend(),
        shortest=efforts(options)["training"].shortest,
    )
    if "layers" in options.parts:
        measure_layers(results, chosen, options, bar)
    if "models" in options.parts:
        measure_models(results, options, bar)
    if "overheads" in options.parts:
        measure_overheads(results, options, bar)
    if "layers" in options.parts and with_torch and jax.default_backend() == "cpu":
        measure_torch(results, options, bar)
    return results


def main(options: Options) -> None:
    """Measures, then writes the report and its picture."""
    check(options)
    options = abridged(options) if options.quick else options
    console, description = Console(), machine.description()
    with Progress(console=console, transient=True) as bar:
        results = measure(options, bar)
    date = datetime.date.today().isoformat()
    name = file_name(date, results.platform, options.quick)
    out = options.out or RESULTS / name
    out.parent.mkdir(parents=True, exist_ok=True)
    drawn = out.with_suffix(".png")
    if results.layers or results.models:
        draw(results, drawn)
    picture = drawn.name if drawn.exists() else ""
    out.write_text(report(results, description, picture))
    console.print(Markdown("\n".join(in_short(results, ""))))
    console.print(f"written to {out}")
    if options.docs:
        publish(out)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
