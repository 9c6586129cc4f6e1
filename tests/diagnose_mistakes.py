"""Mistakes with reports on programs. Part of the table of `test_errors.py`."""

import jax
import jax.numpy as jnp
from mistakes import Row

from jaxnorm.diagnose import collectives

X = jnp.zeros((4, 2, 3))

ROWS = [
    Row(
        "a function where a compiled program belongs",
        lambda: collectives(jax.jit(jnp.sin)),
        TypeError,
        r"^collectives: .*PjitFunction.*jax\.jit\(f\)\.lower\(x\)\.compile\(\)",
    ),
    Row(
        "a program that is lowered and not compiled",
        lambda: collectives(jax.jit(jnp.sin).lower(X)),
        TypeError,
        r"^collectives: .*Lowered.*\.compile\(\)",
    ),
    Row(
        "the text of a program that is not compiled",
        lambda: collectives(jax.jit(jnp.sin).lower(X).as_text()),
        ValueError,
        r"^hlo\.instructions: .* \d+ characters .*ENTRY.*\.compile\(\)\.as_text\(\)",
    ),
]
