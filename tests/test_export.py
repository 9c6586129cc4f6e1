"""Every method lowers for CPU, GPU and TPU, and what is exported for this machine runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from subjects import EACH_METHOD, drawn


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
@EACH_METHOD
def test_a_training_step_lowers_everywhere(subject, dtype):
    x, mask = subject.input(dtype), subject.some_mask()
    layer = subject.layer("linen", x)

    def step(params, stats, x, mask):
        def loss(params, x):
            y, new = layer.train(params, stats, x, mask=mask)
            return (y.astype(jnp.float32) ** 2).sum(), new

        gradients, new = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return gradients, new, layer.infer(params, new, x)

    arguments = drawn(layer.params), layer.stats, x, mask
    jitted = jax.jit(step)
    exported = export.export(jitted, platforms=["cpu", "cuda", "tpu"])(*arguments)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    for found, expected in zip(
        jax.tree.leaves(exported.call(*arguments)), jax.tree.leaves(jitted(*arguments)), strict=True
    ):
        np.testing.assert_allclose(
            found.astype(jnp.float32), expected.astype(jnp.float32), rtol=1e-2, atol=1e-3
        )
