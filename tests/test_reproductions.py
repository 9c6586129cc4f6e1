"""What the reproductions share (`study`): what seeds can tell, and the page."""

import re
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats
from scripts import script


@pytest.fixture(scope="module")
def study():
    return script("study")


def test_a_comparison_is_the_paired_t_test(study):
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.3, 1, (2, 12))
    found = study.compare(first, second)
    interval = stats.ttest_rel(first, second).confidence_interval(0.95)
    np.testing.assert_allclose(found.mean - found.margin, interval.low, rtol=1e-9)
    np.testing.assert_allclose(found.mean + found.margin, interval.high, rtol=1e-9)


@pytest.mark.parametrize(
    ("first", "second", "less"),
    [
        ((1, 2, 3), (5, 6, 7.1), True),
        ((5, 6, 7.1), (1, 2, 3), False),
        ((1, 9), (2, 3), None),
        ((1,), (2,), None),
    ],
)
def test_a_comparison_says_what_seeds_can_tell(study, first, second, less):
    found = study.compare(first, second)
    assert found.less is less
    assert found.more is (None if less is None else not less)


def test_spreads_print_their_deviation(study):
    assert f"{study.Spread.of([1, 2, 3]):.1f}" == "2.0 ± 1.0"
    assert f"{study.Spread.of([2]):.1f}" == "2.0"


def test_a_page_says_all(study, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py", "--data", "digits", "--out", "p.png", "--record"])
    monkeypatch.delenv("JAXNORM_DATA", raising=False)
    finding = study.Finding("a is less than b", "a: 1; b: 2", held=False)
    page = script("study.report").page_of(
        study.Report(
            name="x",
            about="The title.\n\nWhat is claimed.\n\nHow to run:\n\n    not this",
            setting="Errors",
            headings=["norm", "error"],
            rows=[["a", "1"]],
            findings=[finding],
            picture=Figure(),
            alt="curves",
        )
    )
    assert page.startswith("# The title\n\nWhat is claimed.\n")
    assert "not this" not in page
    assert "| a is less than b | a: 1; b: 2 | **did not hold** |" in page
    assert "| a | 1 |" in page
    assert "```bash\npython examples/reproductions/x.py --data digits --record\n```" in page
    assert "[The script](../../examples/reproductions/x.py)" in page
    assert re.search(r"Made on \d{4}-\d\d-\d\d: .*jax \d.*flax \d.*jaxnorm \d", page)
