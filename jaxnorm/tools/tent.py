"""TENT: test-time entropy minimization (Wang et al. 2021, arXiv:2006.10726).

    H = -sum_c p_c log p_c,  p = softmax(logits)      loss = mean of H over the batch

A trained classifier meets data unlike that of its training, without labels. Its norms normalize by
the batches that come, and their scales and biases go down the gradient of the entropy of what it
predicts. Nothing else moves.

When to use: predictions on shifted data (noise, blur, another camera) that come in batches of many
classes. Not for single examples, nor for batches of one class, whose statistics take away what
tells them from others, nor without end: entropy can fall to 0 by predicting one class for all.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from jaxnorm.core import checks, precision
from jaxnorm.core.axes import sizes
from jaxnorm.core.masks import checked_mask, counting, weighted
from jaxnorm.core.pooling import reciprocal
from jaxnorm.tools.adapter.calling import Call, call_of, on_batch
from jaxnorm.tools.adapter.kinds import calls_as_its_kind, keeps_statistics, spec_of
from jaxnorm.tools.adapter.lookalikes import Lookalike, lookalikes, modules_of
from jaxnorm.tools.adapter.marks import why_unread
from jaxnorm.tools.adapter.models import Arrays, Hook, LayerCall, Model, Path, fresh, model_of
from jaxnorm.tools.adapter.norms import Only, chosen, is_norm
from jaxnorm.tools.replacing.frozen import has_frozen_affine


class TentState(NamedTuple):
    """What adaptation knows; a pytree.

    Attributes:
        params: the scales and biases that adapt, by their paths, `"block1/norm/scale"`.
        opt_state: the optimizer's.
        source: all arrays of the model that was given. They never change.
        skipped: how many optimizer steps were left out because they would have put NaN or infinite
            values into `params` or `opt_state`; an int32 scalar.
    """

    params: dict[str, jax.Array]
    opt_state: Any
    source: Arrays
    skipped: jax.Array


class Tent(NamedTuple):
    """Adaptation of a model, as pure functions in the manner of Optax; see `tent`.

    Attributes:
        init: `init() -> state`, the model as it was given; also the way back to it.
        step: `step(state, batch, mask=None) -> (logits, state)`.
        predict: `predict(state, batch) -> logits`, normalized by this batch, without a step.
        model: `model(state)`, a model of the given kind with the adapted scales and biases.
        norms: the paths of the norms that adapt.
        left: by the path of a norm that cannot adapt, why; it does what the model says.
    """

    init: Callable[[], TentState]
    step: Callable[..., tuple[jax.Array, TentState]]
    predict: Callable[[TentState, Any], jax.Array]
    model: Callable[[TentState], Any]
    norms: tuple[str, ...]
    left: dict[str, str]


def tent(
    model: Any,
    optimizer: optax.GradientTransformation,
    batch: Any,
    *,
    call: Call = on_batch,
    only: Only = None,
    norms: Literal["stored", "all"] = "stored",
    steps: int = 1,
    episodic: bool = False,
) -> Tent:
    """Adapts a classifier to unlabelled data by the entropy of its predictions.

        H = -sum_c p_c log p_c,  p = softmax(logits)
        scale, bias <- optimizer step along d mean(H) / d (scale, bias)

    Each step normalizes by the batch in all norms that have stored statistics, whatever the model's
    call says, and moves the scales and biases of norms. All other parameters, the stored statistics
    and the model that was given stay as they are.

    Args:
        model: a Linen module bound to its variables, or an NNX module, that gives logits
            `[..., classes]` of any floating point dtype.
        optimizer: an Optax optimizer, such as `optax.adam(1e-3)`.
        batch: an example batch, by which the norms of the model are found.
        call: how the model is called with a batch, for inference: the model, bound to variables in
            Linen, and the batch, of any structure. NNX models are in `eval()`.
        only: which norms, a pattern of paths such as `"block1/*"`, in which a star stands for
            anything, also for `/`, or a function of the path; None for all. Other norms normalize
            as the model says and keep their parameters.
        norms: `"stored"` adapts the norms with stored statistics, batch norm and its kin, as the
            paper's experiments do; `"all"` also scale and bias of layer norm, group norm and
            others, as SAR does (arXiv:2302.12400).
        steps: how many optimizer steps are made on each batch.
        episodic: whether each call of `step` begins from the model that was given, and forgets what
            other batches taught.

    Returns:
        A `Tent`: `init`, `step` and `predict` are pure and can be jitted and scanned; a state may
        be donated. The logits of `step` are those before its last optimizer step, which then serves
        the next batch, as in the paper: they cost no forward pass of their own. For predictions
        after it, `predict(state, batch)`. `mask` of `step`, booleans or weights of the shape
        of the logits without classes, says which predictions count in the loss; to keep padding out
        of the statistics too, let `call` hand a mask to the norms.

    Raises:
        TypeError: no model; no Optax optimizer; an `only` that is no text and no function; logits
            that are no floating point numbers.
        ValueError: a Linen module without variables; no norm with a scale or bias; options out of
            range; logits of fewer than two classes.

    Numerics:
        The loss is computed in float32 or wider. A class of probability 0 adds 0 to it. A step that
        would put NaN or infinite values into the parameters or the optimizer's state, as a batch
        with a NaN does, is left out and counted, `state.skipped`; its logits are what they are.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> from jaxnorm.tools.tent import entropy, tent
        >>> model = nnx.Sequential(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
        >>> x = jnp.array([[1.0, 8.0], [3.0, 4.0], [2.0, 0.0]])
        >>> adaptation = tent(model, optax.sgd(0.5), x)
        >>> state = adaptation.init()
        >>> logits, state = jax.jit(adaptation.step)(state, x)
        >>> float(entropy(logits).mean()) > float(entropy(adaptation.predict(state, x)).mean())
        True

    Source:
        Wang et al. 2021 (arXiv:2006.10726), section 3.

    Differs:
        From the reference code: norms of every kind and dimension, not of images alone; dropout is
        as the call says, off for inference; examples can be masked. Norms with a training mode of
        their own (`BatchRenorm`, `ghost_batch_size`) normalize as in training.
    """
    who = "tent"
    call = call_of(call, who)
    known = model_of(model, who)
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"{who}: found {type(optimizer).__name__} for an Optax optimizer. Use one: "
            f"{who}(model, optax.adam(1e-3), batch)."
        )
    if (checks.integer(steps) or 0) < 1:
        raise ValueError(f"{who}: steps={steps!r} must be an integer of 1 or more. Use steps=1.")
    if norms not in ("stored", "all"):
        raise ValueError(f"{who}: norms={norms!r} is unknown. Use norms='stored' or norms='all'.")
    adapted, left = _adapted(known, lambda model: call(model, batch), norms, only, who)
    keys = {
        "/".join((*path, name)): key
        for path in adapted
        for name, key in known.params_of(path).items()
    }
    if not keys:
        raise ValueError(
            f"{who}: needs norms with a scale or a bias, found {_described(adapted, left)}. Choose "
            f"others, only=None, norms='all', or adapt the statistics alone."
        )
    hook = _by_batch(adapted, who)
    source = fresh(known.arrays)

    def logits_of(params: dict[str, jax.Array], state: TentState, batch: Any) -> jax.Array:
        arrays = state.source | {key: params[name] for name, key in keys.items()}
        return _checked(known.run(arrays, lambda model: call(model, batch), hook), who)

    def init() -> TentState:
        params = {name: jnp.copy(source[key]) for name, key in keys.items()}
        return TentState(params, optimizer.init(params), fresh(source), jnp.zeros((), jnp.int32))

    def one_step(
        state: TentState, batch: Any, mask: ArrayLike | None
    ) -> tuple[jax.Array, TentState]:
        def loss(params: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            logits = logits_of(params, state, batch)
            return _mean_entropy(logits, mask, who), logits

        gradient, logits = jax.grad(loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        new = optax.apply_updates(state.params, updates), opt_state
        old = state.params, state.opt_state
        sound = _stays_finite(new, old)
        params, opt_state = jax.tree.map(partial(jnp.where, sound), new, old)
        skipped = state.skipped + (~sound).astype(jnp.int32)
        return logits, state._replace(params=params, opt_state=opt_state, skipped=skipped)

    def step(
        state: TentState, batch: Any, mask: ArrayLike | None = None
    ) -> tuple[jax.Array, TentState]:
        if episodic:
            params = {name: state.source[key] for name, key in keys.items()}
            state = state._replace(params=params, opt_state=optimizer.init(params))
        if steps > 1:
            state = lax.fori_loop(
                0, steps - 1, lambda _, state: one_step(state, batch, mask)[1], state
            )
        return one_step(state, batch, mask)

    def predict(state: TentState, batch: Any) -> jax.Array:
        return logits_of(state.params, state, batch)

    def rebuilt(state: TentState) -> Any:
        arrays = state.source | {key: state.params[name] for name, key in keys.items()}
        return known.rebuilt(arrays)

    return Tent(init, step, predict, rebuilt, tuple(map("/".join, adapted)), left)


def _stays_finite(new: Any, old: Any) -> jax.Array:
    """Whether nothing that was finite has become NaN or infinite.

    Not by the gradient, as `optax.apply_if_finite`: a finite one whose square overflows would stay
    in Adam's state for good. What an optimizer holds as infinite by design counts for finite.
    """
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    each = [
        (jnp.isfinite(after) | ~jnp.isfinite(before)).all()
        for after, before in pairs
        if jnp.issubdtype(jnp.result_type(after), jnp.inexact)
    ]
    return jnp.stack(each).all()


def entropy(logits: ArrayLike) -> jax.Array:
    """The entropy of predictions `[..., classes]`, in float32 or wider, `[...]`.

    H = -sum_c p_c log p_c,  p = softmax(logits)
    """
    logits = jnp.asarray(logits)
    log_p = jax.nn.log_softmax(logits.astype(precision.accumulation_dtype(logits.dtype)))
    p = jnp.exp(log_p)
    return -jnp.sum(p * jnp.where(p > 0, log_p, jnp.zeros_like(log_p)), axis=-1)


def _mean_entropy(logits: jax.Array, mask: ArrayLike | None, who: str) -> jax.Array:
    """The mean entropy of the predictions that count, by their weights."""
    shape = logits.shape[:-1]
    mask = checked_mask(mask, shape, who)
    if mask is None:
        return jnp.mean(entropy(logits))
    mask = jnp.broadcast_to(mask, shape)
    # Before anything else: then what does not count has no gradient either, even if it is NaN.
    each = entropy(jnp.where(counting(mask)[..., None], logits, jnp.zeros_like(logits)))
    return jnp.sum(weighted(each, mask)) * reciprocal(jnp.sum(mask.astype(each.dtype)))


def _adapted(
    model: Model, run: Callable[[Any], Any], norms: str, only: Only, who: str
) -> tuple[dict[Path, Any], dict[str, str]]:
    """The norms that adapt, by their paths, and why others do not."""
    modules = modules_of(model, run)
    calls = {path: calls[0] for path, calls in model.layers(run).items()}
    called = {path: call.layer for path, call in calls.items() if is_norm(call.layer)}
    adapted, left = {}, {}
    for path, layer in chosen(called | lookalikes(model, run), only, who).items():
        if isinstance(layer, Lookalike):
            left["/".join(path)] = layer.why
        elif inside := calls[path].inside:
            left["/".join(path)] = why_unread(inside)
        elif not calls_as_its_kind(layer):
            left["/".join(path)] = f"{type(layer).__name__} has a call of its own"
        elif any(map(has_frozen_affine, [layer, *modules.get(path, [])])):
            left["/".join(path)] = "its scale and bias are frozen: no gradient reaches them"
        elif norms == "stored" and not keeps_statistics(spec_of(layer)):
            left["/".join(path)] = "keeps no statistics; norms='all' adapts its scale and bias"
        else:
            adapted[path] = layer
    return adapted, left


def _by_batch(adapted: Mapping[Path, Any], who: str) -> Hook:
    """Lets the norms that adapt normalize by the batch where they have stored statistics."""

    def hook(call: LayerCall) -> Any:
        if call.path not in adapted or not keeps_statistics(spec := spec_of(call.layer)):
            return call.proceed(call.x)
        name = f"{who}, '{'/'.join(call.path)}'"
        x = checks.input_array(call.x, name)
        features = sizes(x.shape, spec._feature_axes(x.ndim, name))
        slots = spec._slots(features, precision.is_complex(x.dtype), name)
        arguments = dict(call.arguments) | dict(use_running_average=False, update_stats=False)
        y, _ = dataclasses.replace(spec, unbound_axis="local")._transform(
            # NNX may keep the variables of several feature axes flat.
            {key: value.reshape(slots[key].shape) for key, value in call.values.items()},
            x,
            arguments.pop("mask", None),
            call.proceed(call.x).dtype,  # which depends on the framework and its options
            name,
            initializing=False,
            **arguments,
        )
        return y

    return hook


def _checked(logits: Any, who: str) -> jax.Array:
    """The logits that a model's call returned.

    Raises:
        TypeError: they are no array of floating point numbers.
        ValueError: they have no axis of two classes or more.
    """
    if not (isinstance(logits, jax.Array) and jnp.issubdtype(logits.dtype, jnp.floating)):
        found = f"{logits.dtype}{list(logits.shape)}" if isinstance(logits, jax.Array) else None
        raise TypeError(
            f"{who}: the model's call returned {found or type(logits).__name__}, but needs logits "
            f"[..., classes] in floating point. Pick them: call=lambda model, batch: "
            f"model(batch)[0]."
        )
    if logits.ndim == 0 or logits.shape[-1] < 2:
        raise ValueError(
            f"{who}: the model's call returned logits of shape {logits.shape}, but the entropy of "
            f"a prediction needs two classes or more on the last axis. For one logit of two "
            f"classes: call=lambda model, batch: jnp.pad(model(batch), ((0, 0), (1, 0)))."
        )
    return logits


def _described(adapted: Mapping[Path, Any], left: Mapping[str, str]) -> str:
    without = {"/".join(path): "has no scale and no bias" for path in adapted}
    found = ", ".join(f"'{path}' ({why})" for path, why in (without | dict(left)).items())
    return found or "a model without norms"
