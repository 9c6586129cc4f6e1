"""Corruptions by hand, and adapting to batches one by one."""

import numpy as np
import pytest


@pytest.fixture
def digits(example):
    return example.images_of("digits", train=128, test=128)


@pytest.mark.usefixtures("quick_compile")
def test_batches_are_adapted_to_one_by_one_and_all_at_once(example, digits):
    network, optimizer = example.recipe(2)
    state = example.create_state(network, 0, digits.train_images, optimizer)
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
