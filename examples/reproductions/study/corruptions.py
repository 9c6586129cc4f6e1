"""Corruptions of small grey images, in the style of ImageNet-C.

Hendrycks and Dietterich ("Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", 2019, arXiv 1903.12261) corrupt photographs in fifteen ways at five severities.
Here are seven ways in their manner, for images of 8x8 pixels and more; lengths are shares of the
side.
"""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from scipy import ndimage

SEVERITIES = (1, 2, 3, 4, 5)


def noise(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise."""
    return images + rng.normal(0, 0.08 * severity, images.shape)


def dots(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Some pixels become black or white."""
    chance = rng.uniform(size=images.shape)
    share = 0.03 * severity
    return np.where(chance < share, 0, np.where(chance > 1 - share, 1, images))


def blur(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Out of focus."""
    del rng
    sigma = 0.025 * severity * images.shape[1]
    return ndimage.gaussian_filter(images, (0, sigma, sigma, 0), mode="nearest")


def motion(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Smeared along a row, over up to half of the image."""
    del rng
    reach = 0.1 * severity * images.shape[1]
    # A window of any width: the mean of the next smaller and larger one, weighted.
    width = 1 + int(reach)
    smear = partial(ndimage.uniform_filter1d, images, axis=2, mode="nearest")
    return smear(width) + (reach - int(reach)) * (smear(width + 1) - smear(width))


def pixelate(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Fewer pixels, down to less than half to a side."""
    del rng
    side = images.shape[1]
    small = (len(images), *[max(round(side * (1 - 0.12 * severity)), 2)] * 2, 1)
    coarse = jax.image.resize(images, small, "linear")
    return np.asarray(jax.image.resize(coarse, images.shape, "nearest"))


def pale(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Less contrast, around the mean of each image."""
    del rng
    mean = images.mean((1, 2, 3), keepdims=True)
    return mean + (1 - 0.17 * severity) * (images - mean)


def bright(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """More light; what is white already stays so."""
    del rng
    return images + 0.12 * severity


Corruption = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]
CORRUPTIONS: dict[str, Corruption] = {
    "noise": noise,
    "dots": dots,
    "blur": blur,
    "motion": motion,
    "pixelate": pixelate,
    "pale": pale,
    "bright": bright,
}


def corrupted(images: np.ndarray, name: str, severity: int) -> np.ndarray:
    """The images with one corruption, the same each time, with values from 0 to 1."""
    changed = CORRUPTIONS[name](images, severity, np.random.default_rng(severity))
    return np.clip(changed, 0, 1).astype(np.float32)
