"""The law of the table: every `raise` of the library is reached by a row."""

import ast
import importlib
import pathlib
import pkgutil

import pytest
from study_mistakes import ROWS

import jaxnorm
import mistakes


@mistakes.while_tracing
def test_mistakes_with_studies():
    for row in ROWS:
        with pytest.raises(row.error, match=row.says) as caught:
            row.trigger()
        assert str(caught.value).isprintable()
        mistakes.note_lines(caught.value)


def test_every_error_of_the_library_is_in_the_table():
    for module in pkgutil.iter_modules(mistakes.__path__):
        importlib.import_module(f"mistakes.{module.name}")
    for make_rows in mistakes.GROUPS:
        make_rows()
    for file in pathlib.Path(jaxnorm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise):
                lines = range(node.lineno, node.end_lineno + 1)
                reached = any((str(file), line) in mistakes.REACHED for line in lines)
                assert reached, f"{file}:{node.lineno}"
