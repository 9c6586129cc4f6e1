"""The house rules that a test can check: layers, light imports, the registry, short files."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from subjects import SUBJECTS
from test_weight_layers import WRAPPERS

import jaxnorm
from jaxnorm.methods import METHODS

ROOT = Path(jaxnorm.__file__).parent
REPOSITORY = Path(__file__).parent.parent
FILES = sorted(ROOT.rglob("*.py"))

# What each floor may import of this library, besides itself.
MAY_IMPORT = {
    "core": set(),
    "methods": {"core"},
    "linen": {"core", "methods"},
    "nnx": {"core", "methods"},
    "tools": {"core", "methods", "linen", "nnx"},
    "diagnose": {"core", "methods", "linen", "nnx", "tools"},
}


def floor(parts):
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "top"


def imports(path):
    """Dotted names that a file imports, at the top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_floors_import_only_what_is_below(path):
    here = floor(("jaxnorm", *path.relative_to(ROOT).with_suffix("").parts))
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "flax":
            assert here not in ("core", "methods", "top"), f"{path} imports {name}"
        if parts[0] == "jaxnorm" and here != "top":
            assert floor(parts) in MAY_IMPORT[here] | {here}, f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_fit_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("folder", ["tests", "examples", "benchmarks"])
def test_other_files_fit_one_sitting(folder):
    for path in (REPOSITORY / folder).rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 500, path


def test_importing_the_library_loads_no_flax():
    program = (
        "import sys, jaxnorm\n"
        "assert not any(name.split('.')[0] in ('flax', 'optax') for name in sys.modules)\n"
        "assert jaxnorm.linen.BatchNorm and jaxnorm.nnx.BatchNorm\n"
        "assert 'flax' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def public_functions():
    return {name for name in vars(jaxnorm) if not name.startswith("_")}


def what_is_missing(method):
    """A to-do list for a new method."""
    test_files = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    pages = {name: (REPOSITORY / name).read_text() for name in ("README.md", "docs/methods.md")}
    home = sys.modules[method.function.__module__].__doc__ or ""
    laws = {*WRAPPERS, *(subject.method for subject in SUBJECTS)}
    there = {
        f"jaxnorm.{method.function.__name__}": method.function.__name__ in public_functions(),
        f"jaxnorm.linen.{method.name}": hasattr(jaxnorm.linen, method.name),
        f"jaxnorm.nnx.{method.name}": hasattr(jaxnorm.nnx, method.name),
        f"a row for {method.name} in tests/subjects.py or test_weight_layers.py": method.name
        in laws,
        f"a test of jaxnorm.{method.function.__name__}": f"jaxnorm.{method.function.__name__}("
        in test_files,
        **{
            f"a row for {method.name} in {name}": f"`{method.name}`" in pages[name]
            for name in pages
        },
        "the paper in the file's docstring": method.papers[0].arxiv in home,
    }
    return [name for name, found in there.items() if not found]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_method_is_complete(method):
    assert what_is_missing(method) == []


def test_a_forgotten_piece_is_named():
    forgotten = METHODS[0]._replace(name="NoSuchNorm")
    assert len(what_is_missing(forgotten)) == 5


def test_the_table_of_methods_is_that_of_the_registry():
    namespace = runpy.run_path(str(REPOSITORY / "docs" / "methods_table.py"))
    assert namespace["table"]() == namespace["TARGET"].read_text(), "python docs/methods_table.py"


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_every_module_is_a_registered_method(framework):
    classes = {
        name
        for name, value in vars(getattr(jaxnorm, framework)).items()
        if isinstance(value, type) and not issubclass(value, Exception)
    }
    assert classes == {method.name for method in METHODS}


@pytest.mark.parametrize("home", [jaxnorm, jaxnorm.tools, jaxnorm.diagnose])
def test_public_names_are_documented_with_an_example(home):
    for name, value in vars(home).items():
        if not name.startswith("_") and callable(value) and not isinstance(value, type):
            assert ">>> " in (value.__doc__ or ""), name
