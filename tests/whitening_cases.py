"""What the tests of whitening share: layouts, groups and masks."""

import numpy as np


def data(*shape, seed=0, offset=1.0):
    """Correlated features along the last axis."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape) @ rng.normal(size=(shape[-1], shape[-1])) + offset


def some_mask(*shape, seed=1):
    return np.random.default_rng(seed).random(shape) < 0.6


def some_weights(*shape, seed=1):
    return some_mask(*shape, seed=seed) * np.random.default_rng(seed + 1).uniform(0.2, 3, shape)


CASES = {
    "matrix": dict(shape=(9, 4), axis=-1, groups=1),
    "groups": dict(shape=(9, 6), axis=1, groups=3),
    "features first": dict(shape=(4, 3, 5), axis=0, groups=2),
    "features between": dict(shape=(3, 4, 2, 5), axis=1, groups=2),
    "masked": dict(shape=(3, 5, 4), axis=-1, groups=2, mask=(3, 5, 1)),
    "weighted examples": dict(shape=(6, 4, 5), axis=1, groups=1, weights=(6, 1, 1)),
    "all masked": dict(shape=(3, 5, 4), axis=-1, groups=2, nothing=(1, 1, 1)),
}


def case_of(name):
    """The input, options that all functions take, and the number of groups."""
    given = CASES[name]
    where = some_mask(*given["mask"]) if "mask" in given else None
    where = some_weights(*given["weights"]) if "weights" in given else where
    where = np.zeros(given["nothing"], bool) if "nothing" in given else where
    return data(*given["shape"]), dict(axis=given["axis"], where=where), given["groups"]
