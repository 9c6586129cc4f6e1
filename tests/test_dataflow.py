"""Which norm is fed by which layer, and for all others the reason why they cannot be folded."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jaxnorm
from jaxnorm import linen as jnn
from jaxnorm.tools.adapter.models import model_of
from jaxnorm.tools.folding.dataflow import dataflow
from jaxnorm.tools.folding.pairing import Pairing

VECTOR, IMAGE = jnp.ones((2, 3)), jnp.ones((2, 4, 4, 3))


def pairing_of(model, x):
    adapter = model_of(model, "test")
    flow = dataflow(adapter, lambda model: model(x))
    return Pairing(adapter, flow, [place.call.path for place in flow.places])


class Body(nn.Module):
    """A Linen module that does what a function says."""

    body: Callable[[Any], Any]

    @nn.compact
    def __call__(self, x):
        return self.body(x)


def linen(body, x=VECTOR):
    module = Body(body)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return module.bind(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))


def dense(name="dense", **options):
    return nn.Dense(4, name=name, **options)


def norm(name="norm", kind=nn.BatchNorm, **options):
    return kind(use_running_average=True, name=name, **options)


def one_kernel_for_two(x):
    layer = dense()
    return norm()(layer(x)), norm("other")(layer(x))


def cast(dtype):
    return lambda x: norm()(dense(param_dtype=jnp.bfloat16)(x.astype(jnp.bfloat16)).astype(dtype))


class OtherKernel(nn.Dense):
    """A layer that computes with another kernel than the stored one."""

    def param(self, name, *args, **options):
        value = super().param(name, *args, **options)
        return value - value.mean() if name == "kernel" else value


class NoBias(nn.Dense):
    """A layer that stores a bias and adds none."""

    def param(self, name, *args, **options):
        value = super().param(name, *args, **options)
        return None if name == "bias" else value


class OtherScale(nn.BatchNorm):
    """A norm whose scale is another than the stored one."""

    def param(self, name, *args, **options):
        return 1 + super().param(name, *args, **options)


def product(of_kernel=lambda kernel: kernel, of_product=lambda y: y):
    """A layer whose product was exchanged."""

    def dot_general(x, kernel, dimensions, **_):
        return of_product(lax.dot_general(x, of_kernel(kernel), dimensions))

    return lambda x: norm()(dense(dot_general=dot_general)(x))


def read_by_the_model(x):
    layer = norm()
    y = layer(dense()(x))
    return y, layer.variables["batch_stats"]["mean"].sum()


def more(step):
    return rf"^'dense' does more than its kind: its kernel or output goes through '{step}'"


STRAIGHT = "not straight from a convolution or dense layer"
REFUSED = {
    "activation between": (
        lambda x: norm()(nn.relu(dense()(x))),
        rf"^its input comes from 'max' of relu, {STRAIGHT}$",
    ),
    "norm first": (
        lambda x: dense()(norm()(x)),
        rf"^its input comes from the model's input, {STRAIGHT}$",
    ),
    "norm before a convolution with padding": (
        lambda x: nn.Conv(4, (3, 3), name="conv")(norm()(x)),
        rf"^its input comes from the model's input, {STRAIGHT}; nor does it go into 'conv' after "
        r"it, whose padding is not normalized$",
    ),
    "norm before a convolution with a number as padding": (
        lambda x: nn.Conv(4, (1, 1), padding=1, name="conv")(norm()(nn.relu(x))),
        rf"^its input comes from 'max' of relu, {STRAIGHT}; nor does it go into 'conv'",
    ),
    "norm before a convolution without padding": (
        lambda x: nn.Conv(4, (1, 1), name="conv")(norm()(x)),
        rf"^its input comes from the model's input, {STRAIGHT}$",
    ),
    "norm before a convolution and a branch": (
        lambda x: nn.Conv(3, (3, 3), name="conv")(y := norm()(x)) + y,
        rf"^its input comes from the model's input, {STRAIGHT}$",
    ),
    "another norm between": (
        lambda x: norm()(nn.LayerNorm(name="other")(dense()(x))),
        rf"^its input comes from 'other', {STRAIGHT}$",
    ),
    "branch": (
        lambda x: (y := dense()(x)) + norm()(y),
        r"^what 'dense' makes is also used by 'add'$",
    ),
    "branch to another norm": (
        lambda x: [norm(name)(y) for y in [dense()(x)] for name in ("norm", "other")],
        r"^what 'dense' makes is also used by 'other'$",
    ),
    "returned as well": (
        lambda x: (norm()(y := dense()(x)), y),
        r"^what 'dense' makes is also used by the model's output$",
    ),
    "branch after a cast": (
        lambda x: (norm()(y := dense(dtype=jnp.bfloat16)(x).astype(jnp.float32)), jnp.tanh(y)),
        r"^what 'dense' makes is also used by 'tanh'$",
    ),
    "cast to fewer digits": (
        lambda x: norm()(dense()(x).astype(jnp.bfloat16)),
        rf"^its input comes from 'convert_element_type', {STRAIGHT}$",
    ),
    "layer called twice": (one_kernel_for_two, r"^'dense' is called 2 times$"),
    "norm called twice": (
        lambda x: [shared(dense(name)(x)) for shared in [norm()] for name in "ab"],
        r"^it is called 2 times$",
    ),
    "in training": (
        lambda x: nn.BatchNorm(use_running_average=False, name="norm")(dense()(x)),
        r"^it is in training: call the model for inference.*train=False$",
    ),
    "training in the call": (
        lambda x: jnn.BatchNorm(name="norm")(dense()(x), use_running_average=False),
        r"^it is in training",
    ),
    "mask": (
        lambda x: norm()(dense()(x), mask=jnp.ones((2, 1), bool)),
        r"^it is called with a mask$",
    ),
    "other features": (
        lambda x: norm(axis=0)(dense()(x)),
        r"^its features lie along axes \(0,\), those that 'dense' makes along \(1,\)$",
    ),
    "einsum of unnamed axes": (
        lambda x: norm()(nn.Einsum((2, 3, 4), "...c,...cd->...d", use_bias=False, name="e")(x)),
        r"^its features lie along axes \(1,\), those that 'e' makes along \(\)$",
    ),
    "computed kernel": (
        lambda x: norm()(jnn.WeightNorm(dense())(x)),
        r"^'dense' has no stored kernel: it is computed by '\w+'",
    ),
    "kernel read otherwise": (
        lambda x: norm()(OtherKernel(4, name="dense")(x)),
        more("sub"),
    ),
    "product with another kernel": (product(jnp.tanh), more("tanh")),
    "product with a quantized kernel": (
        product(lambda kernel: (100 * kernel).astype(jnp.int8).astype(jnp.float32)),
        more("convert_element_type"),
    ),
    "product with a kernel in few digits": (
        product(lambda kernel: kernel.astype(jnp.float8_e4m3fn).astype(jnp.float32)),
        more("convert_element_type"),
    ),
    "product with a normalized kernel": (
        product(lambda kernel: kernel * jnp.sum(kernel**2)),
        more("mul"),
    ),
    "scaled product": (product(of_product=lambda y: 2 * y), more("mul")),
    "product of the kernel with itself": (
        lambda x: norm()(
            dense(dot_general=lambda x, k, *_, **__: x.sum() + (k + 1).T @ k, use_bias=False)(x)
        ),
        more("add"),
    ),
    "kernel in both factors": (
        lambda x: norm()(dense(dot_general=lambda x, k, *_, **__: (x @ jnp.sin(k)) @ k.T @ k)(x)),
        r"^'dense' does more than its kind: its kernel is in both factors of its product$",
    ),
    "another kernel than its own": (
        product(lambda kernel: jnp.ones_like(kernel)),
        r"^'dense' does more than its kind: it makes no product with its stored kernel$",
    ),
    "no product": (
        product(of_product=lambda y: jnp.zeros_like(y)),
        r"^'dense' does more than its kind: it does not make its output itself$",
    ),
    "bias left out": (
        lambda x: norm()(NoBias(4, name="dense")(x)),
        r"^'dense' does more than its kind: it does not add its stored bias$",
    ),
    "parameter of a norm read otherwise": (
        lambda x: OtherScale(use_running_average=True, name="norm")(dense()(x)),
        r"^OtherScale has a param of its own, so that it is not known what 'norm' does$",
    ),
    "statistics read by the model": (
        read_by_the_model,
        r"^the mean of 'norm' is also used by 'reduce_sum'$",
    ),
    "part instance norm": (
        lambda x: norm(kind=jnn.IBNa)(nn.Conv(4, (1, 1))(x)),
        r"^instance norm, a part of it, goes by the input$",
    ),
    "part layer norm": (
        lambda x: norm(kind=jnn.SwitchableNorm)(nn.Conv(4, (1, 1))(x)),
        r"^a part of it goes by the input$",
    ),
    "whitening": (
        lambda x: norm(kind=jnn.IterNorm)(dense()(x)),
        r"^it mixes features by a matrix, which is not done here$",
    ),
    "layer norm": (
        lambda x: nn.LayerNorm(name="norm")(dense()(x)),
        r"^it goes by the input, not by stored statistics$",
    ),
    "instance norm": (
        lambda x: nn.InstanceNorm(name="norm")(nn.Conv(4, (1, 1))(x)),
        r"^it goes by the input, not by stored statistics$",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    body, reason = REFUSED[case]
    conv = any(word in case for word in ("convolution", "instance", "part layer"))
    found = pairing_of(linen(body, IMAGE if conv else VECTOR), IMAGE if conv else VECTOR)
    assert ("norm",) not in found.pairs
    assert re.search(reason, found.left["norm",]), found.left


FOLLOWED = {
    "cast to more digits": cast(jnp.float32),
    "inner jit": lambda x: norm()(jax.jit(lambda y: y.astype(jnp.float32))(dense()(x))),
    "a name for checkpoints": lambda x: norm()(checkpoint_name(dense()(x), "kept")),
    "products in other dtypes": product(
        lambda kernel: kernel.astype(jnp.bfloat16).T.T.astype(jnp.float32)
    ),
    "mask of the kernel": product(lambda kernel: kernel * jnp.eye(3, 4)),
    "tracked instance norm": lambda x: norm(kind=jnn.InstanceNorm, track_running_stats=True)(
        dense()(x)
    ),
}


@pytest.mark.parametrize("case", FOLLOWED)
def test_followed(case):
    found = pairing_of(linen(FOLLOWED[case]), VECTOR)
    assert found.pairs["norm",].layer.call.path == ("dense",)
    assert not found.left


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return norm()(nn.Dense(3, name="dense")(x)), None


def scanned(**lifts):
    lifted = nn.scan(Step, split_rngs={"params": True}, length=2, **lifts)
    return linen(lambda x: lifted(name="steps")(x, None)[0])


def test_layers_in_a_scan_are_pairs_if_they_are_repeated_alike():
    path = ("steps", "norm")
    each = pairing_of(scanned(variable_axes={"params": 0, "batch_stats": 0}), VECTOR)
    assert each.pairs[path].stacked == 1
    alike = {"variable_broadcast": ("params", "batch_stats")}
    lifted = nn.scan(Step, length=2, split_rngs={"params": False}, **alike)
    shared = pairing_of(linen(lambda x: lifted(name="steps")(x, None)[0]), VECTOR)
    assert not shared.left
    assert shared.pairs[path].stacked == 0
    mixed = nn.scan(
        Step,
        length=2,
        split_rngs={"params": False},
        variable_broadcast="params",
        variable_axes={"batch_stats": 0},
    )
    left = pairing_of(linen(lambda x: mixed(name="steps")(x, None)[0]), VECTOR).left
    assert left[path].startswith("it and 'steps/dense' are not repeated alike")
    moved = pairing_of(scanned(variable_axes={"params": 1, "batch_stats": 0}), VECTOR).left
    assert moved[path] == "'steps/dense' has no stored kernel: it is computed by 'transpose'"


def test_layers_under_vmap():
    path = ("members", "norm")
    lifted = nn.vmap(
        Step,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        axis_size=2,
        in_axes=(None, None),
    )
    found = pairing_of(linen(lambda x: lifted(name="members")(x, None)[0]), VECTOR)
    assert found.pairs[path].stacked == 1


# --- What only NNX models can do


class Two(nnx.Module):
    """Two dense layers with norms."""

    def __init__(self, tied=False):
        rngs = nnx.Rngs(0)
        self.first, self.second = (nnx.Linear(3, 3, use_bias=False, rngs=rngs) for _ in range(2))
        self.norm, self.other = (nnx.BatchNorm(3, rngs=rngs) for _ in range(2))
        if tied:
            self.second.kernel = self.first.kernel

    def __call__(self, x):
        return self.other(self.second(self.norm(self.first(x))))


def test_tied_kernels():
    assert pairing_of(Two(tied=True), VECTOR).left == {
        ("norm",): "the kernel of 'first' is also used by 'second'",
        ("other",): "'second' has no kernel of its own: it is that of another, 'first/kernel'",
    }


def test_low_rank_beside_the_kernel():
    class Adapted(Two):
        def __init__(self):
            super().__init__()
            self.first = nnx.LoRALinear(3, 3, lora_rank=2, rngs=nnx.Rngs(0))

    assert re.search(
        more("add").replace("dense", "first"), pairing_of(Adapted(), VECTOR).left["norm",]
    )


def test_kernel_used_by_the_model():
    class Tied(Two):
        def __call__(self, x):
            return self.norm(self.first(x)) @ self.first.kernel[...].T

    left = pairing_of(Tied(), VECTOR).left
    assert left["norm",] == "the kernel of 'first' is also used by 'transpose'"
    assert left["other",] == "it is not called here"


def test_linen_norms_that_are_not_called():
    model = linen(lambda x: norm()(dense()(x)))
    module, variables = model.unbind()
    more = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
    stats = {**variables["batch_stats"], "elsewhere": more}
    found = pairing_of(module.bind({**variables, "batch_stats": stats}), VECTOR)
    assert found.left == {("elsewhere",): "it is not called here"}


def test_conditions_and_loops():
    class InBranches(Two):
        def __call__(self, x):
            x = lax.cond(x.sum() > 0, lambda x: self.norm(self.first(x)), lambda x: x, x)
            return lax.fori_loop(0, x.sum().astype(int), lambda _, x: self.other(self.second(x)), x)

    found = pairing_of(InBranches(), VECTOR)
    assert found.pairs["norm",].layer.call.path == ("first",)
    assert found.left["other",] == "'second' has no stored kernel: it is computed by 'while'"


def test_computed_kernel_in_nnx():
    class Wrapped(Two):
        def __init__(self):
            super().__init__()
            self.first = jaxnorm.nnx.WeightNorm(self.first, rngs=nnx.Rngs(0))

    left = pairing_of(Wrapped(), VECTOR).left
    assert "kernel" in left["norm",]
    assert "computed by" in left["norm",]


def test_domains_have_their_own_statistics():
    class Adapted(Two):
        def __init__(self):
            super().__init__()
            options = dict(domains=("a", "b"), separate_affine=True, rngs=nnx.Rngs(0))
            self.norm = jaxnorm.nnx.AdaBN(3, **options)
            self.other = jaxnorm.nnx.AdaBN(3, domain="b", **options)

        def __call__(self, x):
            return self.other(self.second(self.norm(self.first(x), domain="a")))

    pairs = pairing_of(Adapted(), VECTOR).pairs
    keys = {role: key[-1] for role, key in pairs["norm",].keys.items()}
    assert keys == {n: n for n in ("kernel", "mean", "var", "scale")} | {"offset": "bias"}
    keys = {role: key[-1] for role, key in pairs["other",].keys.items()}
    assert keys == {
        "kernel": "kernel",
        "mean": "mean_b",
        "var": "var_b",
        "scale": "scale_b",
        "offset": "bias_b",
    }


def test_the_flat_program_names_what_it_sees():
    flow = dataflow(
        adapter := model_of(linen(lambda x: norm()(dense()(x))), "test"),
        lambda model: model(VECTOR),
    )
    first, second = flow.places
    assert (first.call.path, second.call.path) == (("dense",), ("norm",))
    assert flow.origin(flow.variable(second, "mean")) == ("batch_stats", "norm", "mean")
    made = flow.steps[second.ends].outputs[0]
    assert [str(step) for step in flow.users(made)] == ["the model's output"]
    assert flow.shape(made).shape == (2, 4)
    assert flow.others_that_use(("params", "dense", "kernel"), first) == []
    assert set(adapter.arrays) >= {("params", "dense", "kernel")}
