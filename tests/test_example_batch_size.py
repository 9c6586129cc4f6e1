"""The example of small and dependent batches, and what all reproductions share."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure
from scipy import stats

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    import batch_size

    yield batch_size
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def study(example):
    import study

    return study


@pytest.mark.usefixtures("quick_compile")
def test_the_quick_form_runs(example, tmp_path, capsys):
    options = example.Options(quick=True, data="digits", sizes=(32,), out=tmp_path / "picture.png")
    report = example.main(options)
    assert [row[0] for row in report.rows] == list(example.NORMS)
    errors = np.array([row[1:] for row in report.rows], float)
    assert (errors[:, 0] < 60).all()  # chance is 90
    assert "means nothing" in capsys.readouterr().out
    assert image.imread(options.out).shape[1] > 800


def test_batches_of_one_class(example):
    labels = np.repeat(np.arange(10), 7)
    batches = example.of_one_class(labels, 4, 50, 0)
    assert batches.shape == (50, 4)
    assert (labels[batches] == labels[batches][:, :1]).all()
    assert len(set(labels[batches][:, 0])) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": (0, 0)}, "--seeds must differ"),
        ({"seeds": (-1,)}, "--seeds must be numbers from 0 on"),
        ({"record": True, "quick": True}, "--record keeps full results"),
        ({"out": Path("picture.txt")}, "--out must end in"),
        ({"out": Path("nowhere/picture.png")}, "there is no folder nowhere"),
    ],
)
def test_impossible_options_are_refused(example, options, message):
    with pytest.raises(sys.modules["digits"].UsageError, match=message):
        example.Options(**options).check()


@pytest.mark.parametrize("options", [{"sizes": (0,)}, {"sizes": ()}, {"epochs": 0}, {"rate": -1.0}])
def test_impossible_numbers_are_refused(example, options):
    with pytest.raises(sys.modules["digits"].UsageError, match=r"--(sizes|epochs) must be"):
        example.Options(**options).check()


def test_batches_larger_than_the_data_are_refused(example):
    with pytest.raises(sys.modules["digits"].UsageError, match="5000 images is more than the 50"):
        example.main(example.Options(data="digits", sizes=(5000,), train_images=50))


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
    from study.report import page_of

    monkeypatch.setattr(sys, "argv", ["x.py", "--data", "digits", "--out", "p.png", "--record"])
    monkeypatch.delenv("JAXNORM_DATA", raising=False)
    finding = study.Finding("a is less than b", "a: 1; b: 2", held=False)
    page = page_of(
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
    assert "```bash\npython examples/x.py --data digits --record\n```" in page
    assert re.search(r"Made on \d{4}-\d\d-\d\d: .*jax \d.*flax \d.*jaxnorm \d", page)
