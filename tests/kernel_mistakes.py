"""Mistakes with the choice of kernels. Part of the table of `test_errors.py`."""

import os
from unittest import mock

import jax.numpy as jnp
from mistakes import Row

import jaxnorm
from jaxnorm.diagnose import norm_kernels

X = jnp.zeros((4, 2, 3))


def with_use(use):
    with jaxnorm.use_kernels(use):
        return jaxnorm.layer_norm(X)


def with_variable(use):
    with mock.patch.dict(os.environ, {"JAXNORM_KERNELS": use}):
        return jaxnorm.layer_norm(X)


USES = r"'automatic', 'always', 'never'.*the default: 'automatic'"

ROWS = [
    Row(
        "unknown use of kernels",
        lambda: with_use("sometimes"),
        ValueError,
        rf"^use_kernels: use='sometimes' is none of {USES}",
    ),
    Row(
        "unknown use of kernels in the environment",
        lambda: with_variable("1"),
        ValueError,
        rf"^JAXNORM_KERNELS='1' is none of {USES}",
    ),
    Row(
        "kernels for a platform that has none",
        lambda: norm_kernels(jaxnorm.layer_norm, X, platform="rocm"),
        ValueError,
        r"^norm_kernels: platform='rocm' is none of 'cpu', 'tpu', 'cuda'.*platform='tpu'",
    ),
]
