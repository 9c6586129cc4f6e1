"""The reproduction on whitening, in its quick form, and what it measures by itself."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib import image

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    import whitening

    yield whitening
    sys.path.remove(str(EXAMPLES))


@pytest.mark.usefixtures("quick_compile")
def test_the_quick_form_runs(example, tmp_path):
    out = tmp_path / "picture.png"
    report = example.main(
        example.Options(quick=True, data="digits", out=out, width=16, group=4, rates=(0.5,))
    )
    assert [row[0] for row in report.rows] == [
        "batch norm",
        "DBN, groups of 16",
        "IterNorm, groups of 16",
    ]
    loss = [float(row[2].split()[0]) for row in report.rows]
    assert max(loss) < 2.3  # it learns: ten classes by chance have a loss of log 10
    condition = [float(row[6]) for row in report.rows]
    assert condition[1] < condition[2] < condition[0]
    assert all(finding.held is None for finding in report.findings)  # one seed does not tell
    assert image.imread(out).shape[1] > 1000


def test_eigenvalues_and_condition_number(example):
    """Of data with a covariance known by hand: variances 9, 4 and 1 along turned axes."""
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * 3)).reshape(3, -1).T
    turned = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    values = example.eigenvalues(signs * [3, 2, 1] @ turned + 7)
    np.testing.assert_allclose(values, [9, 4, 1])
    assert example.condition(values) == pytest.approx(9)
    # The smallest tenth does not count: here one of ten.
    assert example.condition(np.array([8.0] + [2.0] * 8 + [0.0])) == 4


@pytest.mark.usefixtures("quick_compile")
def test_what_norms_hand_on(example):
    """DBN hands on variance 1 in all directions; batch norm for single features only."""
    images = np.random.default_rng(0).normal(size=(64, 2, 2, 1)).astype(np.float32)
    images[:, 1] += images[:, 0]
    means = {}
    for kind in (example.Kind("batch norm"), example.Kind("DBN", 4)):
        network, optimizer = example.recipe(kind, 4, 1)
        state = example.create_state(network, 0, images, optimizer)
        (values,) = example.handed_on(network, state, images)
        means[kind.method] = values
    np.testing.assert_allclose(means["DBN"], 1, rtol=1e-2)
    np.testing.assert_allclose(means["batch norm"].sum(), 4, rtol=1e-3)
    assert means["batch norm"][0] > 1.2


def test_a_rate_is_set_without_another_optimizer(example):
    kind = example.Kind("batch norm")
    network, optimizer = example.recipe(kind, 4, 1)
    images = np.ones((2, 2, 2, 1), np.float32)
    state = example.create_state(network, 0, images, optimizer)
    ones = jax.tree.map(np.ones_like, state.params)
    for rate in (0.5, 2.0):
        after = example.at_rate(state, rate).apply_gradients(grads=ones)
        moved = state.params["Dense_0"]["kernel"] - after.params["Dense_0"]["kernel"]
        np.testing.assert_allclose(moved, rate, rtol=1e-6)


def test_the_best_rate_is_that_of_the_smallest_loss(example):
    def runs(*losses):
        return [example.Run(np.array([loss]), 0.0, 0.0, np.ones(1), 1.0) for loss in losses]

    by_rate = {0.1: runs(0.5, 0.6), 1.0: runs(0.2, 0.4), 9.0: runs(0.1, np.nan)}
    assert example.best(by_rate) == 1.0


def test_alike_up_to_a_tenth(example):
    assert example.alike([1.0, 2.0, 3.0], [1.0, 2.01, 2.99]) is True
    assert example.alike([0.5, 1.0, 1.6], [1.0, 2.0, 3.0]) is True  # less is not worse
    assert example.alike([1.5, 3.0, 4.6], [1.0, 2.0, 3.0]) is False
    assert example.alike([1.0, 9.0], [2.0, 2.0]) is None
    assert example.alike([1.0], [1.0]) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 5}, "--group must divide --width"),
        ({"rates": (0.0,)}, "--rates must be positive"),
        ({"iterations": (0,)}, "--iterations must be 1 or more"),
        ({"steps": 0}, "--steps and --depth must be 1 or more"),
        ({"batch_size": 5000}, "training images only"),
        ({"out": Path("picture.txt")}, "--out must end in"),
    ],
)
def test_impossible_options_are_refused(example, change, message):
    with pytest.raises(example.UsageError, match=message):
        example.main(example.Options(**{"data": "digits", **change}))
