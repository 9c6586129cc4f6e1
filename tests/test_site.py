"""The site without Sphinx: every page is in a table of contents, every link leads somewhere."""

import ast
import os
import re
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from scripts import SCRIPTS

import jaxnorm
from jaxnorm.methods import METHODS

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md"))
FENCE = re.compile(r"^ *(`{3,})(.*?)\n(.*?)^ *\1 *$", flags=re.MULTILINE | re.DOTALL)
TABLES = runpy.run_path(str(DOCS / "registry_tables.py"))


@pytest.fixture(scope="module")
def extensions():
    """The modules of docs/_ext that need no Sphinx."""
    sys.path.insert(0, str(DOCS / "_ext"))
    import public_names

    yield public_names
    sys.path.remove(str(DOCS / "_ext"))


def constant_of(path, name):
    """What a module binds to a name at its top, without importing it."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise KeyError(name)


def name_of(page):
    return page.relative_to(DOCS).as_posix()


def listed_in(page):
    """The pages in the tables of contents of a page."""
    entries = []
    for _, opening, content in FENCE.findall(page.read_text()):
        if opening.strip() == "{toctree}":
            lines = (line.strip() for line in content.splitlines())
            entries += [line for line in lines if line and not line.startswith(":")]
    generated = constant_of(DOCS / "_ext" / "generated_toctrees.py", "CONTENTS")
    entries += generated.get(name_of(page).removesuffix(".md"), ())
    return {found for entry in entries for found in page.parent.glob(f"{entry}.md")}


def reachable():
    seen, found = set(), {DOCS / "index.md"}
    while found:
        seen |= found
        found = {below for page in found for below in listed_in(page)} - seen
    return seen


def test_every_page_is_in_a_table_of_contents():
    assert [name_of(page) for page in PAGES if page not in reachable()] == []


def anchors(page):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    text = FENCE.sub("", page.read_text())
    slugs = set()
    for heading in re.findall(r"^#{1,4} (.*)$", text, flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        number = 0
        while (f"{slug}-{number}" if number else slug) in slugs:
            number += 1
        slugs.add(f"{slug}-{number}" if number else slug)
    return slugs


def broken_links(page):
    text = FENCE.sub("", page.read_text())
    broken = []
    for target in re.findall(r"\]\(<?([^)>\s]+)>?(?: \"[^\"]*\")?\)", text):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = Path(os.path.normpath(page.parent / path)) if path else page
        names_heading = anchor and file.suffix == ".md"
        if not file.exists() or (names_heading and anchor not in anchors(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize(
    "page",
    [*PAGES, *sorted(REPOSITORY.glob("*.md"))],
    ids=lambda page: str(page.relative_to(REPOSITORY)),
)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# A heading, and `code`\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#a-heading-and-code) [c](https://example.org)\n"
        "![d](missing.png) [e](other.md#no-such) [f](#here)\n```\n[g](in_code.md)\n```\n"
    )
    assert broken_links(page) == ["missing.png", "other.md#no-such", "#here"]


def gallery_picture(name):
    pictures = constant_of(DOCS / "_ext" / "gallery.py", "PICTURES")
    candidates = [f"reproductions/{name}.png", f"images/{name}.png", f"images/{name}.svg"]
    candidates += [pictures[name]] if name in pictures else []
    return next((picture for picture in candidates if (DOCS / picture).exists()), None)


def test_an_example_has_a_card_with_a_picture():
    without = [str(path) for name, path in SCRIPTS.items() if gallery_picture(name) is None]
    assert without == [], "run them with --record, or add to docs/gallery_pictures.py"


def test_cards_lead_to_pages():
    for name, page in constant_of(DOCS / "_ext" / "gallery.py", "PAGES").items():
        assert name in SCRIPTS
        assert (DOCS / f"{page}.md").exists()


def test_every_public_name_is_in_the_reference(extensions):
    documented = set()
    for page in (DOCS / "reference").glob("*.md"):
        for _, opening, content in FENCE.findall(page.read_text()):
            if opening.startswith("{names}"):
                documented |= {f"{opening.split()[1]}.{name}" for name in content.split()}
    assert documented == set(extensions.public_names())
    assert {"jaxnorm.batch_norm", "jaxnorm.linen.BatchNorm", "jaxnorm.tools.fold"} <= documented


def test_tables_are_those_of_the_registry():
    for page, text in TABLES["pages"]().items():
        assert page.read_text() == text, "python docs/registry_tables.py"


OPTIONS = {
    "GroupNorm": {"num_groups": 2},
    "AdaBN": {"domains": ("here",)},
    "DecorrelatedBatchNorm": {"num_groups": 2},
    "IterNorm": {"num_groups": 2},
}
OF_ACTIVATIONS = [method for method in METHODS if not TABLES["acts_on_weights"](method)]


@pytest.mark.parametrize("method", OF_ACTIVATIONS, ids=lambda method: method.name)
def test_what_depends_on_the_batch(method):
    """The column of the decision page, found out by changing another example."""
    layer = getattr(jaxnorm.nnx, method.name)(4, rngs=nnx.Rngs(0), **OPTIONS.get(method.name, {}))
    call = {"domain": "here"} if method.name == "AdaBN" else {}
    x = jax.random.normal(jax.random.key(0), (3, 5, 4))
    before, after = layer(x, **call), layer(x.at[2].multiply(3.0), **call)
    depends = bool(jnp.abs(before[:2] - after[:2]).max() > 1e-4)
    assert depends == TABLES["looks_across"](method)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_decision_page_has_code_for_it(method):
    page = (DOCS / "which_norm.md").read_text()
    start = page.index("## Images in large batches")
    optional = {"DecorrelatedBatchNorm", "IBNb"}  # named beside their siblings
    assert f"jaxnorm.nnx.{method.name}(" in page[start:] or method.name in optional
