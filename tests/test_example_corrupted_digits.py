"""The reproduction of adapting to corrupted digits, quick, on data that need no files."""

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    import corrupted_digits

    yield corrupted_digits
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def digits(example):
    return example.images_of("digits", train=128, test=128)


@pytest.mark.usefixtures("quick_compile")
def test_adabn_helps_against_brightness(example, tmp_path):
    out = tmp_path / "picture.png"
    options = example.Options(quick=True, data="digits", target_images=256, out=out)
    report = example.main(options)
    rows = {
        row[0]: dict(zip(report.headings[1:], map(float, row[1:]), strict=True))
        for row in report.rows
    }
    assert len(rows) == 8
    assert rows["AdaBN"]["bright"] < rows["as trained"]["bright"] - 20
    assert rows["as trained"]["clean"] < 30
    assert all(finding.held is None for finding in report.findings)  # a single seed tells nothing
    pixels = image.imread(out)
    assert pixels.shape[1] > 1000
    assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 50


@pytest.mark.usefixtures("quick_compile")
def test_batches_are_adapted_to_one_by_one_and_all_at_once(example, digits):
    state = example.trained(digits.train_images, digits.train_labels, seed=0, steps=2)
    batches = example.split(digits.test_images, 50)
    assert batches.shape == (2, 50, 8, 8, 1)  # what fills no batch is left out
    logits = example.adapter(state, digits.test_images, 16)(batches)
    for batch, found in zip(batches, logits, strict=True):
        adapted = example.adapt_stats(
            example.bound(state), [batch], prior_strength=16, progress=False
        )
        np.testing.assert_allclose(found, adapted(batch), atol=1e-4)


def test_errors_by_hand(example):
    logits = np.eye(3)[[[0, 1], [2, 2]]]
    assert example.error_of(logits, np.array([0, 1, 2, 0, 1])) == 25.0
    by_way = {"TENT": {"noise 5": [1.0, 2.0], "blur 5": [3.0, 6.0], "clean": [50.0, 50.0]}}
    assert example.mean_error(by_way, "TENT") == [2.0, 4.0]


def test_corruptions_grow_and_stay_in_range(example, digits):
    images = digits.test_images
    for name in example.CORRUPTIONS:
        changed = [example.corrupted(images, name, one) for one in example.SEVERITIES]
        change = [float(np.square(one - images).mean()) for one in changed]
        assert all(one.min() >= 0 and one.max() <= 1 for one in changed), name
        assert all(one.dtype == np.float32 and one.shape == images.shape for one in changed), name
        assert change[-1] > 2 * change[0] > 0, (name, change)
        np.testing.assert_array_equal(changed[2], example.corrupted(images, name, 3))


def test_corruptions_by_hand(example):
    images = np.zeros((1, 10, 10, 1), np.float32)
    images[0, 5, 5, 0] = 1.0
    pale = example.CORRUPTIONS["pale"](images, 5, np.random.default_rng(0))
    np.testing.assert_allclose([pale.mean(), np.ptp(pale)], [0.01, 0.15], atol=1e-6)
    smeared = example.CORRUPTIONS["motion"](images, 3, np.random.default_rng(0))
    np.testing.assert_allclose([smeared.sum(), smeared.max()], [1, 0.25], atol=1e-6)
    assert np.count_nonzero(smeared.sum((0, 2, 3))) == 1  # along its row alone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps and --passes must be at least 1"),
        ({"tent_rate": 0.0}, "--tent-rate positive"),
        ({"train_images": 10}, "must be at least 64"),
        ({"seeds": (0, 0)}, "--seeds must differ"),
    ],
)
def test_impossible_options_are_refused(example, change, message):
    with pytest.raises(example.UsageError, match=message):
        example.main(example.Options(**{"data": "digits", "quick": True, **change}))


def test_foreign_digits_need_files(example, monkeypatch):
    monkeypatch.delenv("JAXNORM_DATA", raising=False)
    with pytest.raises(example.UsageError, match="JAXNORM_DATA"):
        example.main(example.Options(data="digits", quick=True, foreign=True))
