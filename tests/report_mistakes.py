"""Mistakes with the report on norms. Part of the table of `test_errors.py`."""

import jax.numpy as jnp
from flax import linen as nn
from mistakes import Row

from jaxnorm.diagnose.norms import NormReport, report_norms

X = jnp.zeros((4, 3))

ROWS = [
    Row(
        "report on what is no model",
        lambda: report_norms({"scale": X}, X),
        TypeError,
        r"^report_norms: found dict.*report_norms\(model\.bind\(variables\), \.\.\.\)",
    ),
    Row(
        "report on a Linen module without variables",
        lambda: report_norms(nn.LayerNorm(), X),
        ValueError,
        r"^report_norms: .*LayerNorm has no variables.*bind\(variables\)",
    ),
    Row(
        "picture of no norms",
        lambda: NormReport((), None).picture(),
        ValueError,
        r"^NormReport\.picture: found 0 norms.*report_norms\(model, x\)",
    ),
]
