"""The images that the examples train on: scikit-learn's digits, MNIST, Fashion-MNIST, or USPS.

Nothing is downloaded. scikit-learn brings its 1797 images along; the others are read from
`mnist.npz`, `fashion_mnist.npz` and `usps.npz` in the folder that the environment variable
JAXNORM_DATA names.
"""

import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from parts.command import UsageError

CLASSES = 10


@dataclass(frozen=True)
class Dataset:
    """Images as rows of pixels between 0 and 1, and their labels."""

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    default_steps: int


Choice = Literal["auto", "digits", "mnist", "fashion_mnist", "usps"]

IN_FILES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "usps": "USPS"}
"""Data sets that are read from files of these names, with `.npz`."""


def load_dataset(choice: Choice, seed: int) -> Dataset:
    """Loads one of the data sets; "auto" takes MNIST if JAXNORM_DATA is set, else the digits."""
    folder = os.environ.get("JAXNORM_DATA", "")
    if choice == "digits" or (choice == "auto" and not folder):
        return load_small_digits(seed)
    if not folder:
        raise UsageError(
            f"--data {choice} needs the environment variable JAXNORM_DATA to name a folder with "
            f"{choice}.npz; --data digits needs no files"
        )
    name = "mnist" if choice == "auto" else choice
    return load_mnist(Path(folder) / f"{name}.npz", IN_FILES[name])


def load_small_digits(seed: int) -> Dataset:
    """The 1797 digits of 8x8 pixels that come with scikit-learn; a quarter is for testing."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        np.asarray(images / 16, np.float32),
        np.asarray(labels, np.int32),
        test_size=0.25,
        stratify=labels,
        random_state=seed,
    )
    train_images, test_images, train_labels, test_labels = map(np.asarray, parts)
    return Dataset("digits", train_images, train_labels, test_images, test_labels, 4000)


def load_mnist(path: Path, name: str = "MNIST") -> Dataset:
    """A data set in the form of MNIST, with its usual split."""
    way_out = "; to train on scikit-learn's digits instead, use --data digits"
    if not path.is_file():
        raise UsageError(f"JAXNORM_DATA is set, but there is no file {path}{way_out}")
    keys = ("x_train", "y_train", "x_test", "y_test")
    try:
        with np.load(path) as arrays:
            missing = [key for key in keys if key not in arrays]
            if missing:
                raise UsageError(f"{path} has no array {', '.join(missing)}{way_out}")
            train_images, train_labels, test_images, test_labels = (arrays[key] for key in keys)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = type(error).__name__
        raise UsageError(f"{path} cannot be read as an npz file ({reason}){way_out}") from error

    for images, labels in ((train_images, train_labels), (test_images, test_labels)):
        images_fit = images.dtype == np.uint8 and images.ndim == 3 and images.size > 0
        labels_fit = labels.dtype == np.uint8 and labels.shape == images.shape[:1]
        if not (images_fit and labels_fit and labels.max() < CLASSES):
            raise UsageError(
                f"{path} must hold uint8 images of shape [count, height, width] and as many uint8 "
                f"labels from 0 to {CLASSES - 1}{way_out}"
            )

    def pixels(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1).astype(np.float32) / 255

    return Dataset(
        name,
        pixels(train_images),
        train_labels.astype(np.int32),
        pixels(test_images),
        test_labels.astype(np.int32),
        8000,
    )


def draw_batches(count: int, batch_size: int, steps: int, seed: int) -> np.ndarray:
    """Indices of shape [steps, batch_size], shuffled anew for each pass over `count` images."""
    if batch_size > count:
        raise UsageError(
            f"a batch of {batch_size} images is more than the {count} training images; "
            "take smaller batches"
        )
    generator = np.random.default_rng(seed)
    per_pass = count // batch_size
    passes = [
        generator.permutation(count)[: per_pass * batch_size].reshape(per_pass, batch_size)
        for _ in range(math.ceil(steps / per_pass))
    ]
    return np.concatenate(passes)[:steps]
