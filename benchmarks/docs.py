"""Copies the figures of the latest report into the docs, so that the two never disagree.

python -m benchmarks.docs
"""

import re
import shutil
import sys
from pathlib import Path

from benchmarks.machine import REPOSITORY
from benchmarks.report import BEGIN, END, latest

PAGE = REPOSITORY / "docs" / "benchmarks.md"
PICTURE = REPOSITORY / "docs" / "images" / "benchmarks.png"
RESULTS = REPOSITORY / "benchmarks" / "results"
BETWEEN = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)


def figures(report: Path) -> str:
    """What the docs show of a report: machine, versions, goals, means, picture, and where it is."""
    text = report.read_text()
    found = BETWEEN.search(text)
    if found is None:
        raise ValueError(f"{report} has no part between {BEGIN} and {END}.")
    date, (machine, versions) = report.stem[:10], text.splitlines()[2:4]
    lines = [BEGIN, "", f"Measured {date}. {machine} {versions}"]
    lines += found[0].splitlines()[1:-1]
    source = f"All tables: [{report.name}](../benchmarks/results/{report.name})."
    shown = "\n".join([*lines, source, "", END])
    return re.sub(r"\]\([^()]*\.png\)", f"](images/{PICTURE.name})", shown)


def publish(report: Path, page: Path = PAGE, picture: Path = PICTURE) -> None:
    """Writes the figures of a report into the page, and its picture beside the docs' others."""
    shown = figures(report)
    page.write_text(BETWEEN.sub(lambda _: shown, page.read_text()))
    drawn = report.with_suffix(".png")
    if drawn.exists():
        shutil.copyfile(drawn, picture)


if __name__ == "__main__":
    newest = latest(RESULTS)
    if newest is None:
        sys.exit(f"benchmarks.docs: {RESULTS} has no report. Run python -m benchmarks first.")
    publish(newest)
    print(f"{PAGE} shows {newest.name}")
