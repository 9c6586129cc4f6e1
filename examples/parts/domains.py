"""Two data sets of digits that look different.

MNIST and USPS, read from `mnist.npz` and `usps.npz` in the folder that JAXNORM_DATA names, in the
form that `digits.py` reads. Or scikit-learn's digits and a shifted version of them: less contrast,
blurred, and moved by a pixel.
"""

import math
import os
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np

from parts.command import UsageError
from parts.digits import Dataset, load_mnist, load_small_digits

PIXELS = 16
# For a fair comparison both data sets get as many training images, and MNIST fewer test images.
TRAIN_IMAGES, TEST_IMAGES = 7000, 2000


class Domain(NamedTuple):
    """A data set: images [count, 16, 16, 1] with values from 0 to 1, and their labels."""

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def domain_of(name: str, data: Dataset) -> Domain:
    """At most so many images of a data set, in one size."""
    train = np.random.default_rng(0).permutation(len(data.train_images))[:TRAIN_IMAGES]
    return Domain(
        name,
        resized(data.train_images[train]),
        data.train_labels[train],
        resized(data.test_images[:TEST_IMAGES]),
        data.test_labels[:TEST_IMAGES],
    )


def resized(images: np.ndarray) -> np.ndarray:
    """Square images as rows of pixels, as [count, 16, 16, 1]."""
    side = math.isqrt(images.shape[1])
    shape = (len(images), PIXELS, PIXELS, 1)
    return np.asarray(jax.image.resize(images.reshape(-1, side, side, 1), shape, "linear"))


def shifted(domain: Domain) -> Domain:
    """The same digits as from a worse scanner: blurred, moved, in grey on grey."""

    def seen(images: np.ndarray) -> np.ndarray:
        blurred = sum(
            np.roll(images, (row, column), (1, 2)) for row in (-1, 0, 1) for column in (-1, 0, 1)
        )
        return 0.4 + 0.3 * np.roll(blurred / 9, 1, 2)

    return domain._replace(
        name="shifted digits",
        train_images=seen(domain.train_images),
        test_images=seen(domain.test_images),
    )


def load_domains(choice: Literal["auto", "digits", "mnist"]) -> tuple[Domain, Domain]:
    """The two data sets."""
    folder = os.environ.get("JAXNORM_DATA", "")
    if choice == "digits" or (choice == "auto" and not folder):
        small = domain_of("digits", load_small_digits(0))
        return small, shifted(small)
    if not folder:
        raise UsageError(
            "--data mnist needs the environment variable JAXNORM_DATA to name a folder with "
            "mnist.npz and usps.npz; --data digits needs no files"
        )
    mnist, usps = (load_mnist(Path(folder) / f"{name}.npz") for name in ("mnist", "usps"))
    return domain_of("MNIST", mnist), domain_of("USPS", usps)
