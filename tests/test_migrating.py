"""What docs/migrating says of other libraries: names, defaults and recorded numbers.

The tables are compared with our layers and presets, and where a library is installed with the
library. There its code in the page runs too, and must give the numbers that the page records.
"""

import dataclasses
import importlib
import inspect
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxnorm
from jaxnorm.tools.importing.presets import PRESETS

FOLDER = Path(__file__).parent.parent / "docs" / "migrating"
PEERS = {"pytorch": "torch", "keras": "keras", "haiku": "haiku", "equinox": "equinox"}
"""The framework of each page, as in `PRESETS`."""
LAYERS_OF = {
    "torch": "torch.nn",
    "keras": "keras.layers",
    "haiku": "haiku",
    "equinox": "equinox.nn",
}
ROUNDING = {"haiku_nan_batches": 0.5, "keras_error": 0.5}
"""Relative tolerances of numbers that hang on how a machine rounds."""
EVERY_PEER = pytest.mark.parametrize("page", PEERS)


def text_of(page):
    return (FOLDER / f"{page}.md").read_text()


def table_below(heading, page):
    """The rows of the first table below a heading, without its own heading."""
    _, found, below = text_of(page).partition(f"\n## {heading}\n")
    assert found, heading
    table = re.search(r"((?:^\|.*\n)+)", below, flags=re.MULTILINE)
    assert table is not None
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table[1].splitlines()]
    return rows[2:]


def named(cell):
    """The names in backquotes."""
    return re.findall(r"`([\w.]+)`", cell)


def layer_and_option(cell):
    """`LayerNorm(epsilon)` as two names, or None for a cell of words."""
    found = re.fullmatch(r"`([\w.]+)\((\w+)\)`", cell)
    return found and found.groups()


def value(cell):
    """The value in backquotes; `required` is that of a parameter without a default."""
    if cell == "required":
        return inspect.Parameter.empty
    return eval(cell.strip("`"), {})


def our_default(layer, option):
    fields = {
        field.name: field.default for field in dataclasses.fields(getattr(jaxnorm.linen, layer))
    }
    return fields[option]


def attribute(module, path):
    """An attribute of an attribute, imported where it is a module."""
    try:
        return importlib.import_module(f"{module}.{path}")
    except ImportError:
        head, _, last = path.rpartition(".")
        return getattr(importlib.import_module(f"{module}.{head}".rstrip(".")), last)


@EVERY_PEER
def test_every_name_of_ours_is_there(page):
    for _, layers, functions, *_ in table_below("Names", page):
        for layer in named(layers):
            assert hasattr(jaxnorm.linen, layer), layer
            assert hasattr(jaxnorm.nnx, layer), layer
        for function in named(functions):
            assert hasattr(jaxnorm, function), function


@EVERY_PEER
def test_the_defaults_here_are_those_of_the_layers_and_presets(page):
    presets = PRESETS[PEERS[page]]
    stated = set()
    for _, _, here, same, ours in table_below("Defaults", page):
        layer, option = layer_and_option(here)
        assert value(ours) == our_default(layer, option), here
        preset = presets.get(layer, {})
        if same:
            assert value(same) == preset[option], here
            stated.add((layer, option))
        else:
            assert option not in preset, here
    assert stated == {(layer, option) for layer in presets for option in presets[layer]}


@EVERY_PEER
def test_what_is_said_to_be_the_same_follows_from_the_default_there(page):
    """Without the library: its default and our preset are one number in two conventions."""
    compared = 0
    for there, default, here, same, _ in table_below("Defaults", page):
        theirs = layer_and_option(there)
        if theirs and same and default != "required" and value(default) is not None:
            of_new_value = theirs[1] == "momentum" and page == "pytorch"
            expected = 1 - value(default) if of_new_value else value(default)
            assert value(same) == pytest.approx(expected, rel=1e-12), here
            compared += 1
    assert compared >= 4


def test_the_table_of_epsilons_is_that_of_the_presets():
    kinds = set()
    columns = ("flax", "torch", "keras", "haiku", "equinox")
    for layer, *cells in table_below("Epsilon", "index"):
        (kind,) = named(layer)
        kinds.add(kind)
        assert our_default(kind, "epsilon") == PRESETS["flax"][kind]["epsilon"]
        for framework, cell in zip(columns, cells, strict=True):
            assert value(cell) == PRESETS[framework][kind]["epsilon"], (kind, framework)
    assert kinds == set(PRESETS["flax"])


def imported(page, monkeypatch):
    """The library of a page, or the test is skipped."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    os.environ.setdefault("KERAS_BACKEND", "jax")
    return pytest.importorskip(PEERS[page])


@EVERY_PEER
def test_names_and_defaults_are_those_of_the_library(page, monkeypatch):
    imported(page, monkeypatch)
    module = LAYERS_OF[PEERS[page]]
    for cell, *_ in table_below("Names", page):
        for name in named(cell):
            assert attribute(module, name), name
    for there, default, *_ in table_below("Defaults", page):
        if theirs := layer_and_option(there):
            parameters = inspect.signature(attribute(module, theirs[0])).parameters
            assert parameters[theirs[1]].default == value(default), there


@EVERY_PEER
@pytest.mark.filterwarnings("default")
def test_the_library_gives_the_recorded_numbers(page, monkeypatch, tmp_path):
    """The page runs with the code of the library; then it sets what is recorded."""
    imported(page, monkeypatch)
    monkeypatch.chdir(tmp_path)
    namespace, measured = {}, {}
    blocks = re.findall(r"```\{(code-cell|code-block)\} \w+\n(.*?)```", text_of(page), re.DOTALL)
    cells = "".join(block for kind, block in blocks if kind == "code-cell")
    with jax.numpy_rank_promotion("allow"):
        for kind, block in blocks:
            before = dict(namespace)
            exec(compile(block, f"{page}.md", "exec"), namespace)
            if kind == "code-block":
                measured |= {
                    name: found
                    for name, found in namespace.items()
                    if name.startswith(f"{PEERS[page]}_") and found is not before.get(name)
                }
    assert len(measured) >= 3
    for name, found in measured.items():
        assert re.search(rf"^(\w+, )*{name}(, \w+)* = ", cells, re.MULTILINE), (
            f"{name}: not recorded"
        )
        limit = ROUNDING.get(name, 2e-3)
        np.testing.assert_allclose(found, namespace[name], rtol=limit, atol=1e-5, err_msg=name)
