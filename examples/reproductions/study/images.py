"""The data sets as square images."""

import math
from typing import NamedTuple

import jax
import numpy as np

from study.examples import Choice, Dataset, UsageError, load_dataset


class Images(NamedTuple):
    """Images [count, side, side, 1] with values from 0 to 1, and labels [count]."""

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def images_of(
    choice: Choice, *, side: int | None = None, train: int | None = None, test: int | None = None
) -> Images:
    """Loads a data set, as `parts.digits.load_dataset`.

    Args:
        choice: `"digits"`, `"mnist"`, `"fashion_mnist"`, `"usps"`, or `"auto"`.
        side: pixels to a side, to which images are resized; None leaves them.
        train: how many training images at most, the same ones each time; None takes all.
        test: how many test images at most.
    """
    for name, number in (("training", train), ("test", test)):
        if number is not None and number < 1:
            raise UsageError(f"{number} {name} images are none; take 1 or more")
    data: Dataset = load_dataset(choice, 0)
    some = np.random.default_rng(0).permutation(len(data.train_images))[:train]
    return Images(
        data.name,
        _square(data.train_images[some], side),
        data.train_labels[some],
        _square(data.test_images[:test], side),
        data.test_labels[:test],
    )


def _square(rows: np.ndarray, side: int | None) -> np.ndarray:
    own = math.isqrt(rows.shape[1])
    images = rows.reshape(-1, own, own, 1)
    if side in (None, own):
        return images
    return np.asarray(jax.image.resize(images, (len(rows), side, side, 1), "linear"))
