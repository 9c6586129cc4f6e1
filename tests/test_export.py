"""Every method lowers for CPU, GPU and TPU, and what is exported for this machine runs.

For known sizes, and for symbolic ones: training, its gradients, inference, and the first variables.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from modules import draw
from subjects import EACH_METHOD, drawn

import jaxnorm

pytestmark = pytest.mark.usefixtures("quick_compile")


def symbolic(subject):
    """The input and the mask, of any size along all axes but those of features."""
    options = subject.options
    features = options.get("feature_axes", options.get("axis", -1))
    known = {a % len(subject.shape) for a in np.atleast_1d(features)}
    names = [str(n) if i in known else f"n{i}" for i, n in enumerate(subject.shape)]
    of_mask = [name if n > 1 else "1" for name, n in zip(names, subject.mask, strict=True)]
    shapes = ", ".join(names), ", ".join(of_mask)
    scope = export.SymbolicScope()
    dtypes = jnp.float32, jnp.bool_
    return [
        jax.ShapeDtypeStruct(export.symbolic_shape(shape, scope=scope), dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ("known", jnp.bfloat16),
        pytest.param("known", jnp.float32, marks=pytest.mark.slow),
        ("any", jnp.float32),
    ],
)
@EACH_METHOD
def test_a_training_step_lowers_everywhere(subject, sizes, dtype):
    x, mask = subject.input(dtype), subject.some_mask()
    layer = subject.layer("linen", x)

    def step(params, stats, x, mask):
        def loss(params, x):
            # What has symbolic sizes is counted in the program; where a mask counts, it always is.
            y, new = layer.train(params, stats, x, **({"mask": mask} if sizes == "known" else {}))
            return (y.astype(jnp.float32) ** 2).sum(), new

        gradients, new = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        first = subject.layer("linen", x)
        return gradients, new, layer.infer(params, new, x, mask=mask), first.params, first.stats

    arguments = drawn(layer.params), layer.stats, x, mask
    types = arguments if sizes == "known" else (*arguments[:2], *symbolic(subject))
    jitted = jax.jit(step)
    exported = export.export(jitted, platforms=["cpu", "cuda", "tpu"])(*types)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    limit = 1e-2 if dtype == jnp.bfloat16 else 1e-4
    for found, expected in zip(
        jax.tree.leaves(exported.call(*arguments)), jax.tree.leaves(jitted(*arguments)), strict=True
    ):
        np.testing.assert_allclose(
            found.astype(jnp.float32), expected.astype(jnp.float32), rtol=limit, atol=0.1 * limit
        )


@pytest.mark.parametrize("sizes", ["2*b, t, 8", "b, 3, 8"])
def test_ghost_batches_of_a_number_of_examples_that_is_divisible(sizes):
    constraints = () if sizes.startswith("2") else ("mod(b, 2) == 0",)
    shape = export.symbolic_shape(sizes, constraints=constraints)
    x = draw((4, 3, 8))
    norm = jax.jit(jaxnorm.ghost_batches(jaxnorm.batch_norm, size=2))
    exported = export.export(norm)(jax.ShapeDtypeStruct(shape, x.dtype))
    chex.assert_trees_all_close(exported.call(x), norm(x), rtol=1e-5, atol=1e-5)
