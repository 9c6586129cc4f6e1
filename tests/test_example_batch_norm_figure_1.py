"""Figure 1 over several seeds: the quick form, and the measuring."""

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    import batch_norm_figure_1

    yield batch_norm_figure_1
    sys.path.remove(str(EXAMPLES))


@pytest.mark.usefixtures("quick_compile")
def test_the_quick_form_runs(example, tmp_path):
    picture = tmp_path / "picture.png"
    report = example.main(example.Options(quick=True, data="digits", out=picture))
    plain, norm = report.rows
    assert [plain[0], norm[0]] == ["without batch norm", "with batch norm"]
    assert len(plain) == len(norm) == len(report.headings) == 6
    assert float(norm[2]) > 0.9 > float(plain[2])
    assert float(norm[1]) < float(plain[1]) == 500
    assert [one.held for one in report.findings] == [None] * 5  # one seed cannot tell
    pixels = image.imread(picture)
    assert pixels.shape[1] > 1000
    assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 40}, "--steps must have room for two looks"),
        ({"record_every": 0}, "--record-every 1 or more"),
        ({"batch_size": 1}, "--batch-size must be at least 2"),
        ({"learning_rate": float("nan")}, "--learning-rate must be positive"),
    ],
)
def test_impossible_options_are_refused(example, change, message):
    with pytest.raises(example.UsageError, match=message):
        example.Options(**{"data": "digits", **change}).check()


@pytest.mark.parametrize("change", [{"batch_size": 5000}, {"train_images": 50}])
def test_batches_larger_than_the_data_are_refused(example, change):
    with pytest.raises(example.UsageError, match=r"is more than the (1347|50) training images"):
        example.main(example.Options(**{"data": "digits", **change}))


def history(example, accuracies, inputs):
    """Of one unit whose percentiles at each look are the rows of `inputs`."""
    looks = len(accuracies)
    return example.History(
        name="made up",
        steps=25 * np.arange(1, looks + 1),
        train_loss=np.zeros(looks),
        test_accuracy=np.array(accuracies),
        sigmoid_inputs=np.array(inputs, float)[:, :, None],
        seconds=0.0,
    )


def test_the_measures_by_hand(example):
    seen = history(example, [0.5, 0.92, 0.88], [[-1, 0, 1], [-2, 1, 2], [-1, -2, 2]])
    assert example.steps_to_goal(seen) == 50
    assert example.travel(seen) == 3  # from -2 to 1
    assert example.relative_travel(seen) == 1  # spreads of 2, 4 and 3
    assert example.widening(seen) == 2
    never = history(example, [0.1, 0.2], [[0, 1, 2], [0, 1, 2]])
    assert example.steps_to_goal(never) == 50
    assert example.travel(never) == 0
    assert example.widening(never) == 1


def test_findings_follow_the_numbers(example):
    calm = [[-1, 0, 1], [-1.1, 0, 1]]
    wild = [[-1, 0, 1], [-3, 2, 3]]
    good = [history(example, [0.5, 0.95], calm), history(example, [0.91, 0.96], calm)] * 3
    bad = [history(example, [0.1, 0.2], wild), history(example, [0.1, 0.3], wild)] * 3
    found = example.findings_of({False: bad, True: good})
    # Where 0.9 was reached at the last look, and never: the same number of steps.
    assert [one.held for one in found] == [None, True, True, True, True]
    assert [one.held for one in example.findings_of({False: good, True: bad})][1:] == [False] * 4


def test_the_first_seed_is_that_of_batch_norm_digits(example, tmp_path):
    """Both scripts train the same networks: this one can be checked against the other."""
    import batch_norm_digits

    other = batch_norm_digits.main(
        batch_norm_digits.Options(data="digits", steps=50, out=tmp_path / "other.png")
    )
    _, found = example.train_all(example.Options(data="digits", steps=50, seeds=(0,)))
    for ours, theirs in ((found[False][0], other.without_norm), (found[True][0], other.with_norm)):
        np.testing.assert_allclose(ours.train_loss, theirs.train_loss, rtol=1e-6)
        np.testing.assert_allclose(ours.test_accuracy, theirs.test_accuracy)
