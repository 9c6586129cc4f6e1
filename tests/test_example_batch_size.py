"""Batches of one class, for the reproduction on batch sizes."""

import numpy as np


def test_batches_of_one_class(example):
    labels = np.repeat(np.arange(10), 7)
    batches = example.of_one_class(labels, 4, 50, 0)
    assert batches.shape == (50, 4)
    assert (labels[batches] == labels[batches][:, :1]).all()
    assert len(set(labels[batches][:, 0])) == 10
