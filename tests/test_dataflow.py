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
from tool_models import shapes_of, shapes_of_nnx

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
    return shapes_of(Body(body), x)


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


class ReluDense(nn.Dense):
    """A layer with something behind it, as users write it."""

    def __call__(self, x):
        return nn.relu(super().__call__(x))


class ReluNorm(nn.BatchNorm):
    """A norm with something behind it."""

    def __call__(self, x):
        return nn.relu(super().__call__(x))


def product(of_kernel=lambda kernel: kernel, of_product=lambda y: y):
    """A layer whose product was exchanged."""

    def dot_general(x, kernel, dimensions, **_):
        return of_product(lax.dot_general(x, of_kernel(kernel), dimensions))

    return lambda x: norm()(dense(dot_general=dot_general)(x))


def read_by_the_model(x):
    layer = norm()
    y = layer(dense()(x))
    return y, layer.variables["batch_stats"]["mean"].sum()


def more(step=None, says="its kernel or output goes through"):
    end = f" '{step}'" if step else "$"
    return rf"^'dense' does more than its kind: {says}{end}"


def comes_from(what, but=""):
    return rf"^its input comes from {what}, not straight from a convolution or dense layer{but}$"


def also_used(by):
    return rf"^what 'dense' makes is also used by {by}$"


def own_call(kind, name):
    return rf"^{kind} has a __call__ of its own, so that it is not known what '{name}' does$"


PADDED = "; nor does it go into 'conv' after it, whose padding is not normalized"
BY_THE_INPUT = r"^it goes by the input, not by stored statistics$"
REFUSED = {
    "activation between": (lambda x: norm()(nn.relu(dense()(x))), comes_from("'max' of relu")),
    "norm first": (lambda x: dense()(norm()(x)), comes_from("the model's input")),
    "norm before a convolution with padding": (
        lambda x: nn.Conv(4, (3, 3), name="conv")(norm()(x)),
        comes_from("the model's input", but=PADDED),
    ),
    "norm before a convolution with a number as padding": (
        lambda x: nn.Conv(4, (1, 1), padding=1, name="conv")(norm()(nn.relu(x))),
        comes_from("'max' of relu", but=PADDED),
    ),
    "norm before a convolution without padding": (
        lambda x: nn.Conv(4, (1, 1), name="conv")(norm()(x)),
        comes_from("the model's input"),
    ),
    "norm before a convolution and a branch": (
        lambda x: nn.Conv(3, (3, 3), name="conv")(y := norm()(x)) + y,
        comes_from("the model's input"),
    ),
    "another norm between": (
        lambda x: norm()(nn.LayerNorm(name="other")(dense()(x))),
        comes_from("'other'"),
    ),
    "branch": (lambda x: (y := dense()(x)) + norm()(y), also_used("'add'")),
    "branch to another norm": (
        lambda x: [norm(name)(y) for y in [dense()(x)] for name in ("norm", "other")],
        also_used("'other'"),
    ),
    "returned as well": (lambda x: (norm()(y := dense()(x)), y), also_used("the model's output")),
    "branch after a cast": (
        lambda x: (norm()(y := dense(dtype=jnp.bfloat16)(x).astype(jnp.float32)), jnp.tanh(y)),
        also_used("'tanh'"),
    ),
    "cast to fewer digits": (
        lambda x: norm()(dense()(x).astype(jnp.bfloat16)),
        comes_from("'convert_element_type'"),
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
    "kernel read otherwise": (lambda x: norm()(OtherKernel(4, name="dense")(x)), more("sub")),
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
        more(says="its kernel is in both factors of its product"),
    ),
    "another kernel than its own": (
        product(lambda kernel: jnp.ones_like(kernel)),
        more(says="it makes no product with its stored kernel"),
    ),
    "no product": (
        product(of_product=lambda y: jnp.zeros_like(y)),
        more(says="it does not make its output itself"),
    ),
    "bias left out": (
        lambda x: norm()(NoBias(4, name="dense")(x)),
        more(says="it does not add its stored bias"),
    ),
    "parameter of a norm read otherwise": (
        lambda x: OtherScale(use_running_average=True, name="norm")(dense()(x)),
        r"^OtherScale has a param of its own, so that it is not known what 'norm' does$",
    ),
    "call of a user's layer": (
        lambda x: norm()(ReluDense(4, name="dense")(x)),
        own_call("ReluDense", "dense"),
    ),
    "call of a user's norm": (
        lambda x: norm(kind=ReluNorm)(dense()(x)),
        own_call("ReluNorm", "norm"),
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
    "layer norm": (lambda x: nn.LayerNorm(name="norm")(dense()(x)), BY_THE_INPUT),
    "instance norm": (lambda x: nn.InstanceNorm(name="norm")(nn.Conv(4, (1, 1))(x)), BY_THE_INPUT),
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


STACKED = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})
NOT_SPLIT = dict(split_rngs={"params": False})
LIFTS = {
    "a scan": (nn.scan, dict(length=2, **STACKED), 1),
    "a scan of one pair": (
        nn.scan,
        dict(length=2, variable_broadcast=("params", "batch_stats"), **NOT_SPLIT),
        0,
    ),
    "a scan of one layer and several norms": (
        nn.scan,
        dict(
            length=2,
            variable_broadcast="params",
            variable_axes={"batch_stats": 0},
            **NOT_SPLIT,
        ),
        "it and 'steps/dense' are not repeated alike: one has variables for each step",
    ),
    "a scan along another axis": (
        nn.scan,
        dict(length=2, **STACKED) | dict(variable_axes={"params": 1, "batch_stats": 0}),
        "'steps/dense' has no stored kernel: it is computed by 'transpose'",
    ),
    "vmap": (nn.vmap, dict(axis_size=2, in_axes=(None, None), **STACKED), 1),
}


@pytest.mark.parametrize("case", LIFTS)
def test_layers_in_a_lift_are_pairs_if_they_are_repeated_alike(case):
    lift, options, expected = LIFTS[case]
    lifted, path = lift(Step, **options), ("steps", "norm")
    found = pairing_of(linen(lambda x: lifted(name="steps")(x, None)[0]), VECTOR)
    if isinstance(expected, str):
        assert found.left == {path: expected}
    else:
        assert not found.left
        assert found.pairs[path].stacked == expected


def test_linen_norms_that_are_not_called():
    module, variables = linen(lambda x: norm()(dense()(x))).unbind()
    more = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
    stats = {**variables["batch_stats"], "elsewhere": more}
    found = pairing_of(module.bind({**variables, "batch_stats": stats}), VECTOR)
    assert found.left == {("elsewhere",): "it is not called here"}


# --- What only NNX models can do


class Two(nnx.Module):
    """Two dense layers with norms."""

    def __init__(self, rngs):
        self.first, self.second = (nnx.Linear(3, 3, use_bias=False, rngs=rngs) for _ in range(2))
        self.norm, self.other = (nnx.BatchNorm(3, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return self.other(self.second(self.norm(self.first(x))))


class Tied(Two):
    """Two layers with one kernel."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.second.kernel = self.first.kernel


class LowRank(Two):
    """A layer with a product beside that with its kernel."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.first = nnx.LoRALinear(3, 3, lora_rank=2, rngs=rngs)


class ReadKernel(Two):
    """A model that uses the kernel of a layer, and not all of its norms."""

    def __call__(self, x):
        return self.norm(self.first(x)) @ self.first.kernel[...].T


class InBranches(Two):
    """A pair in a branch, and one in a loop."""

    def __call__(self, x):
        x = lax.cond(x.sum() > 0, lambda x: self.norm(self.first(x)), lambda x: x, x)
        return lax.fori_loop(0, x.sum().astype(int), lambda _, x: self.other(self.second(x)), x)


class Wrapped(Two):
    """A layer whose kernel is computed."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.first = jaxnorm.nnx.WeightNorm(self.first, rngs=rngs)


# By model, why each of its norms is left, or None for what is folded.
OF_NNX = {
    Tied: (
        r"^the kernel of 'first' is also used by 'second'$",
        r"^'second' has no kernel of its own: it is that of another, 'first/kernel'$",
    ),
    LowRank: (more("add").replace("dense", "first"), None),
    ReadKernel: (
        r"^the kernel of 'first' is also used by 'transpose'$",
        r"^it is not called here$",
    ),
    InBranches: (None, r"^'second' has no stored kernel: it is computed by 'while'$"),
    Wrapped: (r"kernel.* computed by", None),
}


@pytest.mark.parametrize("model", OF_NNX)
def test_nnx_models(model):
    found = pairing_of(shapes_of_nnx(model), VECTOR)
    for name, layer, reason in zip(
        ("norm", "other"), ("first", "second"), OF_NNX[model], strict=True
    ):
        if reason is None:
            assert found.pairs[name,].layer.call.path == (layer,)
        else:
            assert re.search(reason, found.left[name,]), found.left


class Adapted(Two):
    """Norms of several domains, which the call names and the constructor."""

    def __init__(self, rngs):
        super().__init__(rngs)
        options = dict(domains=("a", "b"), separate_affine=True, rngs=rngs)
        self.norm = jaxnorm.nnx.AdaBN(3, **options)
        self.other = jaxnorm.nnx.AdaBN(3, domain="b", **options)

    def __call__(self, x):
        return self.other(self.second(self.norm(self.first(x), domain="a")))


def test_domains_have_their_own_statistics():
    pairs = pairing_of(shapes_of_nnx(Adapted), VECTOR).pairs
    for norm, domain in (("norm", ""), ("other", "_b")):
        keys = {role: key[-1] for role, key in pairs[norm,].keys.items()}
        names = {n: f"{n}{domain}" for n in ("mean", "var", "scale")}
        assert keys == names | {"kernel": "kernel", "offset": f"bias{domain}"}


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
