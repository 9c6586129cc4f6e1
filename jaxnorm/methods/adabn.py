"""Adaptive batch normalization (Li et al. 2016, arXiv:1603.04779): the layer's side.

    y = (x - mean_k) / sqrt(var_k + epsilon) * scale + bias          for data of domain k

Batch norm with a set of running statistics for each domain, chosen at the call. A trained network
is adapted to a new domain by collecting statistics there; its weights stay. With a scale and bias
for each domain too (`separate_affine`) it is the auxiliary batch norm of adversarial training (Xie
et al. 2020, arXiv:1911.09665, section 4.2).

When to use: data of the same task from several sources, each with its own contrast, scanner or
style, known at the call; a network to be carried over to new data without labels; training on clean
and adversarial examples together. Mixed in one batch, domains would share its statistics: give each
call the examples of one domain.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm.core import axes as ax
from jaxnorm.core import precision
from jaxnorm.core.moments import Stats
from jaxnorm.methods.batch_norm import BatchNorm, batch_norm_inference
from jaxnorm.methods.spec import Slot, Values


def adabn(
    x: ArrayLike,
    stats: Mapping[str, Stats],
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    domain: str,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
    who: str = "adabn",
) -> jax.Array:
    """Normalizes each feature by the statistics of a domain (inference).

        y = (x - mean_k) / sqrt(var_k + epsilon) * scale + bias

    Training on data of a domain is `batch_norm`, whose `Moments` are merged or blended into the
    domain's statistics.

    Args:
        x: array of any shape; float, bfloat16 or complex; integers become float32: data of one
            domain.
        stats: mean and variance of each feature, for each domain: running statistics, or exact ones
            of a data set, `merge(...).stats()`.
        domain: whose statistics are used.
        scale, bias, axis, where, epsilon, dtype, who: as in `batch_norm_inference`.

    Returns:
        The result, of the shape of `x`.

    Raises:
        TypeError, ValueError: as `batch_norm_inference`; TypeError also for statistics without
            names, ValueError for a domain that has none.

    Numerics:
        As `batch_norm_inference`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> photos, sketches = jnp.array([[0.0], [2.0]]), jnp.array([[10.0], [50.0]])
        >>> stats = {
        ...     "photos": jaxnorm.moments(photos, axes=0).stats(),
        ...     "sketches": jaxnorm.moments(sketches, axes=0).stats(),
        ... }
        >>> jaxnorm.adabn(sketches, stats, domain="sketches").round(3).tolist()
        [[-1.0], [1.0]]

    Source:
        Li et al. 2016 (arXiv:1603.04779), Algorithm 1.
    """
    if not isinstance(stats, Mapping):
        raise TypeError(
            f"{who}: needs the statistics of each domain by its name, found "
            f"{type(stats).__name__}. Use {{{domain!r}: jaxnorm.Stats(mean, var)}}."
        )
    check_domain(domain, tuple(stats), who)
    return batch_norm_inference(
        x,
        stats[domain],
        scale,
        bias,
        axis=axis,
        where=where,
        epsilon=epsilon,
        dtype=dtype,
        who=who,
    )


def check_domain(domain: str, domains: Sequence[str], who: str) -> None:
    """Raises ValueError unless `domain` is among `domains`."""
    if domain not in domains:
        raise ValueError(
            f"{who}: domain={domain!r} is unknown, there are {', '.join(map(repr, domains))}. "
            f"Use domain={domains[0]!r}, or add it where they are listed."
            if domains
            else f"{who}: domain={domain!r} is unknown, there are none. "
            f"Give its statistics: {{{domain!r}: jaxnorm.Stats(mean, var)}}."
        )


@dataclasses.dataclass(eq=False, repr=False)
class AdaBN(BatchNorm):
    """Batch normalization with running statistics per domain, for `jaxnorm.linen`, `jaxnorm.nnx`.

    A call names its domain: `layer(x, use_running_average, domain="sketches")`. It uses the
    variables of that domain and moves no others. In a network that cannot hand the name on, such as
    `nnx.Sequential`, it is an option of the layers.

    Variables: those of `BatchNorm` for the first domain, under the same names, so that a checkpoint
    of `BatchNorm` is one of this layer; for each other domain `mean_<domain>`, `var_<domain>` and,
    with `debias` or `momentum=None`, `updates_<domain>`; with `update_every` above 1 its own
    `pending_count_<domain>` and so on. With `separate_affine` also `scale_<domain>` and
    `bias_<domain>`.

    In Linen, variables of a call's domain that a checkpoint lacks: statistics start at (0, 1) with
    its first training call, and there is an error in inference, and for parameters. In NNX all
    variables are there from the start, so that inference on a domain without training is by (0, 1).

    Args:
        domains: the names of the domains; the first has the variables' plain names.
        domain: that of calls that name none; None for the first. In NNX it can be set for a whole
            model: `nnx.view(model, domain="sketches")`.
        separate_affine: whether each domain has its own `scale` and `bias`, not only statistics.
        use_running_average, axis, momentum, epsilon, dtype, param_dtype, use_bias, use_scale,
            bias_init, scale_init, axis_name, axis_index_groups, unbound_axis, use_fast_variance,
            zero_centered_scale, debias, running_var, update_stats, skip_nonfinite, update_every,
            ghost_batch_size: as in `BatchNorm`; a call is one of the `update_every` of its domain.

    Raises:
        TypeError, ValueError, NameError: as `BatchNorm`; ValueError also for domains that are none,
            or the same, or unknown, and for missing variables.

    Source:
        Li et al. 2016 (arXiv:1603.04779), Algorithm 1; Xie et al. 2020 (arXiv:1911.09665), section
        4.2, for `separate_affine`.

    Differs:
        From the paper: how statistics are collected is a choice. By training calls of the domain
        with `momentum=None` they are the mean over batches, by `merge` of `Moments` exact.
    """

    _: dataclasses.KW_ONLY
    domains: Sequence[str]
    domain: str | None = None
    separate_affine: bool = False

    def _check_options(self, who: str) -> None:
        super()._check_options(who)
        if (
            not isinstance(self.domains, Sequence)
            or isinstance(self.domains, str)
            or not self.domains
        ):
            raise ValueError(
                f"{who}: domains={self.domains!r} must be a sequence of one name or more. "
                f"Use domains=('source', 'target')."
            )
        if self.domain is not None:
            check_domain(self.domain, tuple(self.domains), who)
        if len(set(self.domains)) != len(self.domains):
            raise ValueError(
                f"{who}: domains={tuple(self.domains)} names a domain twice. "
                f"Use domains={tuple(dict.fromkeys(self.domains))}."
            )

    def _names(self, slots: Mapping[str, Slot], domain: str) -> dict[str, str]:
        """By the names that `BatchNorm` gives its variables, those of `domain`."""

        def shared(slot: Slot) -> bool:
            return slot.collection == "params" and not self.separate_affine

        first = domain == self.domains[0]
        return {
            name: name if first or shared(slot) else f"{name}_{domain}"
            for name, slot in slots.items()
        }

    def _slots(self, features: tuple[int, ...], is_complex: bool, who: str) -> dict[str, Slot]:
        slots = super()._slots(features, is_complex, who)
        return {
            name: slots[plain]
            for domain in self.domains
            for plain, name in self._names(slots, domain).items()
        }

    def _transform(
        self,
        values: Values,
        x: jax.Array,
        mask: ArrayLike | None,
        dtype: Any,
        who: str,
        *,
        domain: str | None = None,
        **mode: Any,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        domain = self.domain if domain is None else domain
        domain = self.domains[0] if domain is None else domain
        check_domain(domain, tuple(self.domains), who)
        features = ax.sizes(x.shape, self._feature_axes(x.ndim, who))
        slots = super()._slots(features, precision.is_complex(x.dtype), who)
        names = self._names(slots, domain)
        missing = [plain for plain, name in names.items() if name not in values]
        chosen = {plain: values[name] for plain, name in names.items() if name in values}
        chosen |= self._substitutes(missing, slots, names, domain, who, **mode)
        y, changed = super()._transform(chosen, x, mask, dtype, who, **mode)
        return y, {names[plain]: value for plain, value in changed.items()}

    def _substitutes(
        self,
        missing: Sequence[str],
        slots: Mapping[str, Slot],
        names: Mapping[str, str],
        domain: str,
        who: str,
        *,
        use_running_average: bool,
        update_stats: bool,
        **_: Any,
    ) -> dict[str, jax.Array]:
        """What stands for variables that a checkpoint lacks: the start of a domain's statistics."""
        for plain in missing:
            if slots[plain].collection == "params":
                raise ValueError(
                    f"{who}: 'params' has no {names[plain]!r}, which separate_affine=True needs "
                    f"for domain={domain!r}. Add it, for example as a copy of {plain!r}."
                )
            if use_running_average and plain != "updates":
                raise ValueError(
                    f"{who}: 'batch_stats' has no {names[plain]!r} by which to normalize data of "
                    f"domain={domain!r}. Collect statistics first: "
                    f"layer(x, use_running_average=False, domain={domain!r})."
                )
        if "updates" in missing and "mean" not in missing and update_stats:
            raise ValueError(
                f"{who}: 'batch_stats' has {names['mean']!r} but no {names['updates']!r}, the "
                f"number of batches behind it, which momentum={self.momentum}, "
                f"debias={self.debias} need. Add it: jnp.full({slots['updates'].shape}, n, "
                f"jnp.float32), or 0 for n to start anew."
            )
        return {
            plain: slots[plain].init(None, slots[plain].shape, slots[plain].dtype)
            for plain in missing
        }
