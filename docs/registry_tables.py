"""Writes the tables of `docs/which_norm.md` and `docs/citing.md` from the registry.

python docs/registry_tables.py

`docs/methods_table.py` writes the longer table of `docs/methods.md`.
"""

import re
from pathlib import Path

from jaxnorm.methods import METHODS, Method

DOCS = Path(__file__).parent


def looks_across(method: Method) -> bool:
    """Whether an example's result depends on the others of its batch, in training."""
    return "batch" in method.pooled_over


def keeps_statistics(method: Method) -> bool:
    """Whether it always has running statistics, by which inference normalizes."""
    return "mean" in re.sub(r"\(.*?\)", "", method.state)


def acts_on_weights(method: Method) -> bool:
    """Whether it wraps a layer, instead of normalizing what flows through the network."""
    return "weight" in method.statistics


CHOICE = {
    "norm": lambda m: f"`{m.name}`",
    "normalizes": lambda m: "weights" if acts_on_weights(m) else "activations",
    "by statistics over": lambda m: m.pooled_over,
    "depends on the batch": lambda m: "yes" if looks_across(m) else "no",
    "running statistics": lambda m: "yes" if keeps_statistics(m) else "no",
    "mask": lambda m: m.mask or "none",
}

PAPERS = {
    "methods": lambda p: ", ".join(f"`{m.name}`" for m in METHODS if p in m.papers),
    "paper": lambda p: f"{', '.join(p.authors)}: {p.title}, {p.year}",
    "arXiv": lambda p: f"[{p.arxiv}](https://arxiv.org/abs/{p.arxiv})",
}


def table(columns: dict, rows: list) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *([of(r) for of in columns.values()] for r in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def pages() -> dict[Path, str]:
    """The pages, with the tables that the registry asks for."""
    papers = list(dict.fromkeys(paper for method in METHODS for paper in method.papers))
    return {
        DOCS / "which_norm.md": _with_table("which_norm.md", table(CHOICE, list(METHODS))),
        DOCS / "citing.md": _with_table("citing.md", table(PAPERS, papers)),
    }


def _with_table(name: str, table: str) -> str:
    page = (DOCS / name).read_text()
    start, end = "<!-- from the registry -->", "<!-- until here -->"
    before, _, rest = page.partition(start)
    return f"{before}{start}\n\n{table}\n\n{end}{rest.partition(end)[2]}"


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text)
        print(f"wrote the table of {page}")
