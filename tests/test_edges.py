"""What no law reaches, each shown by a fault of the library that no other test noticed."""

import dataclasses
import re
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxnorm
from jaxnorm.core.kernels import fits
from jaxnorm.diagnose import report_norms
from jaxnorm.methods import METHODS
from jaxnorm.methods.weight_spec import WeightSpec
from jaxnorm.tools import fold, norm_mask
from jaxnorm.tools.folding import comparison
from jaxnorm.tools.importing.equinox import equinox_arrays
from jaxnorm.tools.importing.flax import _Reader
from jaxnorm.tools.importing.values import fit

# Statistics.


def test_large_numbers_that_count_are_not_taken_for_masked_ones():
    x = jnp.array([[1e10], [3e10], [jnp.nan]])
    y, seen = jaxnorm.batch_norm(x, where=jnp.array([[True], [True], [False]]))
    np.testing.assert_allclose(seen.mean, [2e10], rtol=1e-6)
    np.testing.assert_allclose(y[:2], [[-1], [1]], rtol=1e-5)


def test_complex_statistics_make_real_input_complex():
    stats = jaxnorm.Stats(jnp.array([1 + 2j]), jnp.array([4.0]))
    y = jaxnorm.batch_norm_inference(jnp.array([[3.0]]), stats, epsilon=0)
    np.testing.assert_allclose(y, [[1 - 1j]], rtol=1e-6)


def test_the_variance_of_equal_numbers_has_its_second_derivative():
    found = jax.jit(jax.hessian(lambda x: jaxnorm.moments(x, 0).var))(jnp.ones(4))
    np.testing.assert_allclose(found, 2 / 4 * (np.eye(4) - 1 / 4), atol=1e-6)


def test_groups_of_unequal_size_without_a_mask():
    x = jnp.arange(10.0).reshape(5, 2)
    seen = jax.vmap(
        lambda x: jaxnorm.moments(x, 0, axis_name="d", axis_index_groups=[[0, 1, 2], [3, 4]]),
        axis_name="d",
    )(x)
    assert seen.count.tolist() == [6, 6, 6, 4, 4]
    np.testing.assert_allclose(seen.mean, [2.5, 2.5, 2.5, 7.5, 7.5])


# Layers.

TRAINED = {
    "BatchNorm": "batch_norm",
    "BatchRenorm": "batch_renorm",
    "SwitchableNorm": "switchable_norm",
    "IBNa": "ibn_a",
    "DecorrelatedBatchNorm": "decorrelated_batch_norm",
    "IterNorm": "iter_norm",
}
"""Layers with running means, and the functions that they train by."""


@pytest.mark.parametrize("name", TRAINED)
def test_moments_are_taken_about_running_means_that_are_far_from_zero(name, monkeypatch):
    (method,) = (method for method in METHODS if method.name == name)
    module, shifts = sys.modules[method.spec.__module__], []
    function = getattr(module, TRAINED[name])

    def noted(*arguments, **options):
        shifts.append(options["shift"])
        return function(*arguments, **options)

    layer = getattr(jaxnorm.linen, name)(use_running_average=False)
    x = jax.ShapeDtypeStruct((3, 2, 4), jnp.float32)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    values = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), variables)
    mean = values["batch_stats"]["mean"]
    values["batch_stats"]["mean"] = mean.at[0].set(0.5).at[1].set(5)
    monkeypatch.setattr(module, TRAINED[name], noted)
    layer.apply(values, jnp.ones(x.shape), mutable=["batch_stats"])
    assert shifts[0][:2].tolist() == [0, 5]


def test_iter_norm_takes_its_number_of_steps_for_inference():
    x = jax.random.normal(jax.random.key(0), (8, 4))
    layer = jaxnorm.linen.IterNorm(use_running_average=True, n_steps=2)
    variables = layer.init(jax.random.key(0), x)
    cov = jnp.diag(jnp.arange(1.0, 5))
    stats = {"mean": jnp.zeros(4), "cov": cov[None]}
    y = layer.apply({**variables, "batch_stats": stats}, x)
    given = jaxnorm.JointStats(jnp.zeros((1, 4)), cov[None])
    np.testing.assert_allclose(y, jaxnorm.iter_norm_inference(x, given, n_steps=2), rtol=1e-5)


@pytest.mark.parametrize("name", ["DecorrelatedBatchNorm", "IterNorm", "SwitchableNorm"])
def test_momentum_of_methods_whose_papers_say_it(name):
    assert getattr(jaxnorm.linen, name)().momentum == 0.9
    assert getattr(jaxnorm.nnx, name)(4, rngs=nnx.Rngs(0)).momentum == 0.9


@pytest.mark.parametrize(
    "method", [m for m in METHODS if issubclass(m.spec, WeightSpec)], ids=lambda m: m.name
)
def test_state_of_weight_methods_is_that_of_the_registry(method):
    slots = method.spec()._slots(jnp.ones((3, 2)), method.name)
    state = {name for name, slot in slots.items() if slot.collection == "batch_stats"}
    assert state == set(re.findall(r"\w+", method.state))


def test_the_share_of_instance_norm_is_rounded_to_whole_features():
    x = jnp.arange(24.0).reshape(3, 2, 4)
    _, batch = jaxnorm.ibn_a(x, ratio=0.4)
    assert batch.mean.shape == (2,)


def test_layers_pool_within_groups_of_devices():
    x = jnp.array([0.0, 1, 4, 9]).reshape(4, 1, 1)
    options = dict(use_running_average=False, use_scale=False, use_bias=False, update_stats=False)
    grouped = jaxnorm.linen.BatchNorm(**options, axis_name="d", axis_index_groups=[[0, 1], [2, 3]])
    variables = grouped.init(jax.random.key(0), x[0])
    y = jax.vmap(lambda x: grouped.apply(variables, x), axis_name="d")(x)
    np.testing.assert_allclose(y.ravel(), [-1, 1, -1, 1], atol=1e-4)


# Kernels.


def test_a_tpu_has_a_kernel_for_the_forward_pass_alone():
    def loss(x):
        return (jaxnorm.rms_norm(x).astype(jnp.float32) ** 3).sum()

    traced = jax.jit(jax.value_and_grad(loss)).trace(
        jax.ShapeDtypeStruct((1024, 256), jnp.bfloat16)
    )
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 1


def test_positions_fill_whole_registers():
    """One of them needs the space of sixteen, and twenty that of 32."""
    assert fits.slabs_block((4096, 1, 128), jnp.float32) == 128
    assert fits.slabs_block((4096, 20, 128), jnp.float32) == 64


# Tools.


class Lengths(nn.Module):
    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.ones, (3, 3))
        return jnp.sqrt(x**2 @ weight**2)


def test_a_matrix_called_weight_is_no_scale_of_a_norm():
    model, x = Lengths(), jnp.ones((2, 3))
    assert norm_mask(model.bind(model.init(jax.random.key(0), x)), x) == {"weight": False}


class Millions(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale_init = nn.initializers.constant(1e6)
        return nn.BatchNorm(use_running_average=True, scale_init=scale_init)(nn.Dense(3)(x))


def test_rounding_of_large_outputs_is_no_reason_not_to_fold():
    x = jax.random.normal(jax.random.key(0), (8, 4))
    folded = fold(Millions().bind(Millions().init(jax.random.key(1), x)), x)
    assert folded.pairs == {"BatchNorm_0": "Dense_0"}


def test_a_folded_model_that_makes_nan_differs():
    found = comparison._difference([np.ones(2)], [np.array([1, np.nan])])
    assert found.relative == np.inf


@dataclasses.dataclass
class EquinoxNorm:
    """The fields of `equinox.nn.BatchNorm(mode="batch")` by which its averages are read."""

    mode: str = "batch"
    momentum: float = 0.5
    batch_counter: str = "updates"
    batch_state_index: str = "averages"


def test_averages_of_equinox_are_freed_from_their_start():
    state = {"updates": 2, "averages": (np.array([3.0]), np.array([6.0]))}
    found = equinox_arrays(EquinoxNorm(), state)
    assert found == {"mean": [4.0], "var": [8.0], "updates": 2}


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float16")])
def test_fewer_digits_or_a_smaller_range_are_said_to_be_rounding(dtypes):
    source, model = map(jnp.dtype, dtypes)
    (note,) = fit(np.ones(2, source), model, "scale", 0.0).notes
    assert note == f"{source} of the source was rounded to the model's {model}"


def test_a_scanned_axis_moves_from_where_it_is_there_to_where_it_is_here():
    """Not the other way, which is the same only between neighbours."""
    reader = _Reader({}, {"layers": (2, 0)})
    target: Any = types.SimpleNamespace(name="layers/Dense_0")
    assert reader._along(np.zeros((2, 3, 4)), target).shape == (4, 2, 3)


# Reports.


def test_a_report_counts_values_along_no_batch_axis():
    layer, x = jaxnorm.linen.IBNb(batch_axis=(0, 1)), jnp.ones((2, 3, 4, 5, 6))
    variables = layer.init(jax.random.key(0), x)
    (row,) = report_norms(layer.bind(variables), x, singular_values=False).rows
    assert row.count == 4 * 5


def test_a_report_leaves_masked_nan_alone():
    layer = jaxnorm.linen.BatchNorm(use_running_average=True)
    x = jnp.array([[1.0, 2.0], [3.0, jnp.nan]])
    variables = layer.init(jax.random.key(0), x)
    (row,) = report_norms(layer.bind(variables), x, mask=jnp.isfinite(x)).rows
    assert not row.nonfinite
