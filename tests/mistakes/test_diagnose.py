"""Mistakes with reports on programs and on models, and with the choice of kernels."""

import os
from unittest import mock

import jax
import jax.numpy as jnp
from flax import linen as nn

import jaxnorm
from jaxnorm.diagnose import NormReport, collectives, norm_kernels, report_norms
from mistakes import type_error, value_error, while_tracing
from mistakes.layers import zeros

X = zeros(4, 3)


@while_tracing
def test_programs():
    with type_error("collectives: … PjitFunction … jax.jit(f).lower(x).compile()"):
        collectives(jax.jit(jnp.sin))
    with type_error("collectives: … Lowered … .compile()"):
        collectives(jax.jit(jnp.sin).lower(X))
    text = jax.jit(jnp.sin).lower(X).as_text()
    with value_error(f"hlo.instructions: … {len(text)} characters … ENTRY … .compile().as_text()"):
        collectives(text)


@while_tracing
def test_norms():
    with type_error("report_norms: found dict … report_norms(model.bind(variables), ...)"):
        report_norms({"scale": X}, X)
    with value_error("report_norms: … LayerNorm has no variables … bind(variables)"):
        report_norms(nn.LayerNorm(), X)
    with value_error("NormReport.picture: found 0 norms … report_norms(model, x)"):
        NormReport((), None).picture()


@while_tracing
def test_kernels():
    uses = "'automatic', 'always', 'never' … the default: 'automatic'"
    with (
        value_error(f"use_kernels: use='sometimes' is none of {uses}"),
        jaxnorm.use_kernels("sometimes"),
    ):
        jaxnorm.layer_norm(X)
    with (
        mock.patch.dict(os.environ, {"JAXNORM_KERNELS": "1"}),
        value_error(f"JAXNORM_KERNELS='1' is none of {uses}"),
    ):
        jaxnorm.layer_norm(X)
    with value_error("norm_kernels: platform='rocm' … 'cpu', 'tpu', 'cuda' … platform='tpu'"):
        norm_kernels(jaxnorm.layer_norm, X, platform="rocm")
