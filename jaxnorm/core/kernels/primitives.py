"""Three JAX primitives at whose lowering a kernel may take the place of the specification.

    normalize   x, scale, bias    -> y, mean, var
    push        its tangent, a linear map of those of x, scale, bias
    pull        the transpose: dy -> dx, dscale, dbias

What they compute is the specification. That they are primitives has two reasons: which device a
program is for, and whether the compiler will divide it between several, is known only when it is
lowered; and the transpose of a linear map can be given a form of its own.

No derivative passes through a kernel. `normalize` is called under a rule for its tangent, which is
`push`; all three differentiate by their specification, so that derivatives are of every order.
"""

import operator
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.interpreters import ad, batching, mlir

from jaxnorm.core import axes as ax
from jaxnorm.core.divided import is_divided
from jaxnorm.core.kernels.choice import PLATFORMS, Direction, choose
from jaxnorm.core.kernels.layout import Layout, layout_of
from jaxnorm.core.standardize import Plan, normalize_plainly
from jaxnorm.core.tangent import tangent

SPECIFICATION = "specification: "
"""Before the reason, in the names that profiles and `diagnose.norm_kernels` read."""

Primitive: Any = type(lax.add_p)  # `jax.extend.core` has it as well, and imports Pallas


class Inputs(NamedTuple):
    """Of a normalization, each with the axes of `x`; or their tangents, or gradients.

    `scale` and `bias` are None where there are none; so is a tangent that is zero.
    """

    x: Any
    scale: Any
    bias: Any


class Known(NamedTuple):
    """What the backward pass keeps, each with the axes of the input."""

    inputs: Inputs
    mean: Any
    rstd: Any


def layout(plan: Plan, inputs: Inputs) -> Layout | None:
    """How kernels see the inputs, which may be arrays or their types."""
    return layout_of(plan.axes, inputs.x.shape, inputs.scale, inputs.bias)


def normalize_plainly_whole(plan: Plan, inputs: Inputs):
    """y, mean, var by the specification."""
    y, seen = normalize_plainly(plan, *inputs, None)
    return y, seen.mean, seen.var


def push_plainly(plan: Plan, known: Known, tangents: Inputs):
    """The tangents of y, mean and var by the specification."""
    (x, scale, _), mean, rstd = known
    share = 1 / ax.extent(x.shape, plan.axes)
    return tangent(plan, (x, scale, None, mean, rstd, share), tangents)


def pull_plainly(plan: Plan, known: Known, dy: jax.Array) -> Inputs:
    """The gradients by the specification."""

    def dy_of(tangents):
        return push_plainly(plan, known, tangents)[0]

    return jax.linear_transpose(dy_of, known.inputs)(dy)[0]


def _stats_type(plan: Plan, x: Any) -> Any:
    kept = tuple(1 if axis in plan.axes else size for axis, size in enumerate(x.shape))
    return x.update(shape=kept, dtype=jnp.dtype(jnp.float32), weak_type=False)


def _normalize_types(plan: Plan, inputs: Inputs):
    stats = _stats_type(plan, inputs.x)
    y = inputs.x.update(dtype=jnp.dtype(plan.dtype), weak_type=False)
    return y, stats if plan.use_mean else None, stats


def _push_types(plan: Plan, known: Known, tangents: Inputs):
    del tangents
    return _normalize_types(plan, known.inputs)


def _pull_types(plan: Plan, known: Known, dy: Any) -> Inputs:
    del plan, dy
    return known.inputs


class _Operation:
    """A primitive whose operands are pytrees; in them, None stands for what is absent.

    Args:
        name: of the primitive.
        types: of the results, by the types of the operands.
        plainly: the specification.
        kernel: the same by a kernel, or None if there is none for any platform.
        direction: the normalization, or its gradients, which are sums over examples.
    """

    def __init__(
        self,
        name: str,
        types: Callable[..., Any],
        plainly: Callable[..., Any],
        kernel: Callable[..., Any] | None = None,
        *,
        direction: Direction = "forward",
    ):
        self.primitive = Primitive(f"jaxnorm_{name}")
        self.primitive.multiple_results = True
        self.types, self.kernel = types, kernel
        self.direction: Direction = direction
        self.plainly = partial(_on_leaves, plainly)

        self.primitive.def_abstract_eval(partial(_on_leaves, types))
        self.primitive.def_impl(self.evaluate)
        ad.primitive_jvps[self.primitive] = self.differentiate
        batching.primitive_batchers[self.primitive] = self.batch
        mlir.register_lowering(self.primitive, self.lower_plainly)
        for platform in PLATFORMS if kernel else ():
            lower = partial(self.lower_for, platform)
            mlir.register_lowering(self.primitive, lower, platform=platform)

    def __call__(self, plan: Plan, *values: Any) -> Any:
        leaves, structure = jax.tree.flatten(values)
        results = self.primitive.bind(*leaves, plan=plan, structure=structure)
        like = self.types(plan, *jax.tree.unflatten(structure, map(jax.typeof, leaves)))
        return jax.tree.unflatten(jax.tree.structure(like), results)

    def evaluate(self, *leaves: Any, **params: Any) -> Any:
        """Outside of `jax.jit`."""
        return _jitted(self.primitive, **params)(*leaves)

    def differentiate(self, primals: Any, tangents: Any, **params: Any) -> Any:
        """By the specification, so that derivatives of every order are there."""
        function = partial(self.plainly, **params)
        tangents = tuple(map(ad.instantiate_zeros, tangents))
        _, of_results = jax.jvp(function, tuple(primals), tangents)
        return self.primitive.bind(*primals, **params), of_results

    def batch(self, leaves: Any, axes: Any, *, plan: Plan, structure: Any) -> Any:
        """Under vmap, one more axis that is kept; or where that does not do, the specification."""
        of_parameters = _of_parameters(structure)
        mapped = [axis is not None for axis in axes]
        if self.direction == "forward" and not any(map(operator.and_, mapped, of_parameters)):
            sizes = (leaf.shape[a] for leaf, a in zip(leaves, axes, strict=True) if a is not None)
            leaves = map(partial(_in_front, next(sizes)), leaves, axes, of_parameters)
            plan = plan._replace(axes=tuple(axis + 1 for axis in plan.axes))
            results = self.primitive.bind(*leaves, plan=plan, structure=structure)
        else:
            function = partial(self.plainly, plan=plan, structure=structure)
            with jax.named_scope(f"{SPECIFICATION}examples have parameters of their own"):
                results = jax.vmap(function, in_axes=tuple(axes))(*leaves)
        return results, [0] * len(results)

    def lower_plainly(self, context: Any, *nodes: Any, **params: Any) -> Any:
        """The specification, as JAX lowers any function."""
        return mlir.lower_fun(self.plainly, multiple_results=True)(context, *nodes, **params)

    def lower_for(self, platform: str, context: Any, *nodes: Any, plan: Plan, structure: Any):
        """A kernel, if there is one that serves."""
        first = jax.tree.unflatten(structure, context.avals_in)[0]
        inputs = first.inputs if isinstance(first, Known) else first
        seen, dtype, divided = layout(plan, inputs), inputs.x.dtype, is_divided(context)
        choice = choose(platform, plan, seen, dtype, divided, self.direction)
        if choice.form is None or seen is None or self.kernel is None:
            return self.lower_plainly(context, *nodes, plan=plan, structure=structure)
        # Along which mesh axes operands vary is of no matter to a kernel.
        types = [ShapedArray(aval.shape, aval.dtype) for aval in context.avals_in]
        function = partial(_on_leaves, partial(self.kernel, choice.form, seen))
        lower = mlir.lower_fun(function, multiple_results=True)
        return lower(context.replace(avals_in=types), *nodes, plan=plan, structure=structure)


def _on_leaves(function: Callable[..., Any], *leaves: Any, plan: Plan, structure: Any) -> list[Any]:
    return jax.tree.leaves(function(plan, *jax.tree.unflatten(structure, leaves)))


@cache
def _jitted(primitive: Any, **params: Any) -> Callable[..., Any]:
    return jax.jit(partial(primitive.bind, **params))


def _of_parameters(structure: Any) -> list[bool]:
    """Which operands are scale or bias, or belong to them, which examples share."""
    numbered = jax.tree.unflatten(structure, range(structure.num_leaves))
    paths, _ = jax.tree.flatten_with_path(numbered)
    return [getattr(path[-1], "name", None) in ("scale", "bias") for path, _ in paths]


def _in_front(size: int, leaf: jax.Array, axis: int | None, of_parameters: bool) -> jax.Array:
    if of_parameters:
        return jnp.expand_dims(leaf, 0)
    if axis is None:
        return jnp.broadcast_to(leaf, (size, *leaf.shape))
    return jnp.moveaxis(leaf, axis, 0)


def _normalize_by(form: Any, seen: Layout, plan: Plan, inputs: Inputs):
    x, scale, bias = _as_seen_by(form, seen, inputs)
    groups = {} if seen.kind == "rows" else {"groups": seen.groups}
    options = dict(epsilon=plan.epsilon, use_mean=plan.use_mean, dtype=plan.dtype)
    y, mean, var = form.forward(x, scale, bias, **groups, **options)
    kept = _stats_type(plan, jax.typeof(inputs.x)).shape
    mean, var = (None if one is None else one.reshape(kept) for one in (mean, var))
    return y.reshape(inputs.x.shape), mean, var


def _pull_by(form: Any, seen: Layout, plan: Plan, known: Known, dy: jax.Array) -> Inputs:
    del plan
    inputs, *stats = known
    x, scale, bias = _as_seen_by(form, seen, inputs)
    each = seen.shape[0], seen.groups
    mean, rstd = (None if one is None else one.reshape(each) for one in stats)
    gradients = form.backward(x, scale, mean, rstd, dy.reshape(x.shape), with_bias=bias is not None)
    return jax.tree.map(
        lambda like, gradient: gradient.reshape(like.shape).astype(like.dtype),
        inputs,
        Inputs(*gradients),
    )


def _as_seen_by(form: Any, seen: Layout, inputs: Inputs) -> list[Any]:
    x, *params = inputs
    shape = seen.keeping_axes(x.shape) if form.KEEPS_AXES else seen.shape
    return [x.reshape(shape), *(None if one is None else one.reshape(-1) for one in params)]


def _transpose_push(gradients: Any, *leaves: Any, plan: Plan, structure: Any) -> list[Any]:
    known, tangents = jax.tree.unflatten(structure, leaves)
    absent = [tangent is None for tangent in tangents]
    wanted = Inputs(*(None if no else one for one, no in zip(known.inputs, absent, strict=True)))
    dy, *of_stats = gradients
    if wanted.x is not None and all(type(one) is ad.Zero for one in of_stats):
        found = pull(plan, known, ad.instantiate_zeros(dy))
    else:
        types = _normalize_types(plan, jax.tree.map(jax.typeof, known.inputs))
        results = jax.tree.structure(types)
        whole = jax.tree.unflatten(results, map(ad.instantiate_zeros, gradients))
        (found,) = jax.linear_transpose(partial(push_plainly, plan, known), wanted)(whole)
    of_tangents = [one for one, no in zip(found, absent, strict=True) if not no]
    return [None] * len(jax.tree.leaves(known)) + of_tangents


normalize = _Operation("normalize", _normalize_types, normalize_plainly_whole, _normalize_by)
push = _Operation("push", _push_types, push_plainly)
pull = _Operation("pull", _pull_types, pull_plainly, _pull_by, direction="backward")
ad.primitive_transposes[push.primitive] = _transpose_push
