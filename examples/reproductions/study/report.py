"""The result of a reproduction: printed, drawn, and kept as a page of the documentation."""

import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import jax
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import jaxnorm
from study.command import PageOptions
from study.examples import write_picture
from study.findings import Finding

PAGES = Path(__file__).parents[3] / "docs" / "reproductions"


@dataclass(frozen=True)
class Report:
    """What a reproduction found.

    Attributes:
        name: of the script, without `.py`; picture and page are named after it.
        about: the script's docstring: the first line is the title, what is claimed and done
            follows, and "How to run:" comes last.
        setting: data, network and numbers of the run, in one sentence.
        headings: of the table.
        rows: of the table, as texts.
        findings: each claim, what was measured, whether it held.
        picture: drawn.
        alt: what the picture shows, for those who do not see it.
        notes: paragraphs that follow the findings.
    """

    name: str
    about: str
    setting: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    findings: Sequence[Finding]
    picture: Figure
    alt: str
    notes: Sequence[str] = field(default=())


def conclude(report: Report, options: PageOptions) -> Report:
    """Prints the report, writes its picture, and its page if that is wanted."""
    console = Console()
    table = Table(*report.headings, caption=report.setting, show_lines=False)
    for row in report.rows:
        table.add_row(*row)
    console.print(table)
    if options.quick:
        console.print("A quick run: what follows means nothing.", style="yellow")
    for finding in report.findings:
        console.print(f"[bold]{finding.verdict}[/bold]: {finding.claim}", highlight=False)
        console.print(f"    {finding.measured}", highlight=False, markup=False)
    write_picture(report.picture, options.out or Path(f"{report.name}.png"), dpi=110)
    if options.record:
        write_picture(report.picture, PAGES / f"{report.name}.png", dpi=110)
        page = PAGES / f"{report.name}.md"
        page.write_text(page_of(report))
        console.print(f"page: {page}", markup=False, highlight=False, soft_wrap=True)
    return report


def page_of(report: Report) -> str:
    """The page, in Markdown, with the command that makes it anew."""
    script = f"examples/reproductions/{report.name}.py"
    command = shlex.join(["python", script, *_without_out(sys.argv[1:])])
    data = "JAXNORM_DATA=folder/with/the/npz/files " if os.environ.get("JAXNORM_DATA") else ""
    title, _, about = report.about.partition("\n")
    parts = [
        f"# {title.rstrip('.')}",
        about.partition("How to run:")[0].strip(),
        "## What was found",
        *_findings(report.findings),
        *report.notes,
        f"![{report.alt}]({report.name}.png)",
        "## The numbers",
        f"{report.setting}.",
        _markdown_table(report.headings, report.rows),
        "## Run it yourself",
        f"```bash\n{data}{command}\n```",
        f"Made on {datetime.now(UTC):%Y-%m-%d}: {machine()}. "
        f"[The script](../../{script}) has a `--quick` form and all the options.",
    ]
    return "\n\n".join(parts) + "\n"


def _findings(findings: Sequence[Finding]) -> list[str]:
    if not findings:
        return []
    rows = [(one.claim, one.measured, f"**{one.verdict}**") for one in findings]
    return [
        _markdown_table(("the paper says", "measured here", "verdict"), rows),
        "Spread is the standard deviation between seeds. A claim held if the 95% confidence "
        "interval of the difference, paired by seed, says so, or, where it names a bound, if that "
        "is kept. It did not hold if the interval says the opposite, and cannot be told if it "
        "holds 0. Rounding differs between machines and numbers of cores, and training makes it "
        "grow: another run gives other digits, within the spread.",
    ]


def _without_out(arguments: list[str]) -> list[str]:
    """Where else the picture was written is of no interest."""
    kept = list(arguments)
    if "--out" in kept:
        at = kept.index("--out")
        del kept[at : at + 2]
    return [one for one in kept if not one.startswith("--out=")]


def machine() -> str:
    """Where the numbers come from."""
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processor = _processor() or platform.processor() or platform.machine()
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "numpy"))
    where = f"{device.device_kind}, " if device.platform != "cpu" else ""
    return (
        f"{where}{processor}, {cores} core{'' if cores == 1 else 's'}, {platform.system()}, "
        f"Python {platform.python_version()}, {packages}, jaxnorm {jaxnorm.__version__}"
    )


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        return ""
    return found[1].strip() if found else ""


def _markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
