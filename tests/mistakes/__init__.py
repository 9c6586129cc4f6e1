"""Every error of the library: what provokes it, its type, and what its message says.

A row of this table is a `with` statement: who refuses, then what was found and the fix, with "…"
for words between that carry no meaning; and below it the mistake.

    with value_error("pool: … axes=1 … from -1 to 0"):
        jaxnorm.pool(moments, axes=1)

Most rows are made `while_tracing`: there are no values, so the error comes from shapes, dtypes and
options alone, and nothing is compiled. Rows of tools that work on the values of a model are made
`with_values`. `test_law.py` holds the table against the source: every `raise` has its row.
"""

import functools
import re
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import pytest

GROUPS: list[Callable[[], None]] = []
REACHED: set[tuple[str, int]] = set()


def note_lines(error):
    """Remembers the lines of code through which an error came, for the law."""
    frame = error.__traceback__
    while frame is not None:
        REACHED.add((frame.tb_frame.f_code.co_filename, frame.tb_lineno))
        frame = frame.tb_next


@contextmanager
def refused(error, says):
    """What is done inside raises this error, and its message says this."""
    pattern = r".*".join(re.escape(words.strip()) for words in says.split("…"))
    with pytest.raises(error, match=f"^{pattern}") as caught:
        yield
    assert str(caught.value).isprintable()
    note_lines(caught.value)


value_error = functools.partial(refused, ValueError)
type_error = functools.partial(refused, TypeError)
name_error = functools.partial(refused, NameError)
import_error = functools.partial(refused, ImportError)


def group_of_rows(make):
    """A test that makes each mistake once, also where the law asks for it after pytest did."""
    once = functools.cache(make)
    GROUPS.append(once)
    return once


def while_tracing(rows):
    """A group of rows that are made where there are no values."""

    @functools.wraps(rows)
    def test():
        jax.eval_shape(rows)

    return group_of_rows(test)


def with_values(rows):
    """A group of rows that are made where there are values, compiled quickly."""

    @functools.wraps(rows)
    def test():
        jax.config.update("jax_disable_most_optimizations", True)
        try:
            rows()
        finally:
            jax.config.update("jax_disable_most_optimizations", False)

    return group_of_rows(test)


class Row(NamedTuple):
    """A row whose message is told by a pattern."""

    name: str
    trigger: Callable[[], Any]
    error: type[Exception]
    says: str
