"""Spectral normalization (Miyato et al. 2018, arXiv:1802.05957).

    v <- W u / |W u|,   u <- W^T v / |W^T v|,   sigma = v^T W u          v and u held constant
    w = W / sigma

sigma approximates the largest singular value of the weight, taken as a matrix with one column per
output, so that the layer stretches no vector by more than 1. One step of power iteration at each
training step suffices, because the weight changes slowly and u remembers.

When to use: where the Lipschitz constant of a layer matters, as in discriminators and critics. It
bounds the largest gain of a layer and leaves the others to it; for a convolution it bounds that of
the reshaped kernel, not of the convolution itself. For the speed of ordinary training a
normalization of activations does more.
"""

import dataclasses
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm.core import checks, precision
from jaxnorm.core.normalize import output_dtype
from jaxnorm.methods.spec import Slot, Values
from jaxnorm.methods.weight_spec import WeightSpec


def spectral_norm(
    w: ArrayLike,
    u: ArrayLike,
    *,
    n_steps: int = 1,
    epsilon: float = 1e-12,
    dtype: DTypeLike | None = None,
    who: str = "spectral_norm",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Divides a weight by its largest singular value, found by power iteration (training).

        v = W u / |W u|,   u = W^T v / |W^T v|          n_steps times
        sigma = v^T W u,   w = W / sigma

    Args:
        w: weight `[..., outputs]` with two axes or more, taken as a matrix `[-1, outputs]`; float
            or bfloat16.
        u: the approximation so far of the right singular vector, of shape `[outputs]`, of any
            length above 0, which does not matter: below 1/4 and above 1000 it is made near 1.
        n_steps: how many steps of power iteration to make.
        epsilon: added to squared lengths before vectors are divided by them. With weights that are
            all below 2**-8 it is added to those of a weight scaled up to entries near 1.
        dtype: dtype of the result; None for that of `w`.
        who: the name that error messages give to the caller.

    Returns:
        The weight of the shape of `w`; the new `u`; and sigma, both in float32 or wider. No
        gradient flows through `u`; the gradient of sigma is v u^T.

    Raises:
        TypeError: `w` is not floating point, or `dtype` cannot hold the result.
        ValueError: `w` has fewer than two axes, `u` another length, `n_steps` is below 1.

    Numerics:
        Computes in float32 or wider, also on devices whose matrix products are narrower by default.
        A weight of zeros stays as it is, and leaves `u` as it was. Right for weights of all sizes,
        in float32 from 1e-35 to 1e35.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> w = jnp.diag(jnp.array([4.0, 1.0]))
        >>> w, u, sigma = jaxnorm.spectral_norm(w, jnp.ones(2), n_steps=4)
        >>> w.round(3).tolist(), sigma.round(3).tolist()
        ([[1.0, 0.0], [0.0, 0.25]], 4.0)

    Source:
        Miyato et al. 2018 (arXiv:1802.05957), Algorithm 1.
    """
    w, u = _real_matrix(w, who), jnp.asarray(u)
    if u.shape != w.shape[-1:]:
        raise ValueError(
            f"{who}: u has shape {u.shape}, but the weight of shape {w.shape} has {w.shape[-1]} "
            f"outputs. Start with u=jax.random.normal(key, {w.shape[-1:]}) and keep the new u."
        )
    _check_steps(n_steps, who)
    epsilon = checks.static_epsilon(epsilon, who)
    matrix = w.astype(precision.accumulation_dtype(w.dtype)).reshape(-1, w.shape[-1])
    constant = lax.stop_gradient(matrix)
    old = lax.stop_gradient(u.astype(matrix.dtype))
    new = old * precision.towards_one(_length(old), 2**-2, 2**10)
    v = jnp.zeros(matrix.shape[:1], matrix.dtype)
    # Powers of two keep squares inside of float32. They are put on vectors, which are small.
    factor = precision.towards_one(abs(constant).max(), 2**-8, 2**8)
    least = epsilon * jnp.square(jnp.minimum(factor, 1))
    for _ in range(n_steps):
        v = _unit(_product(constant, new * factor), least)
        new = _unit(_product(v * factor, constant), least)
    sigma = _product(v, _product(matrix, new * factor)) / factor
    new = jnp.where(sigma > 0, new, old)
    return spectral_norm_inference(w, sigma, dtype=dtype, who=who), new, sigma


def spectral_norm_inference(
    w: ArrayLike,
    sigma: ArrayLike,
    *,
    dtype: DTypeLike | None = None,
    who: str = "spectral_norm_inference",
) -> jax.Array:
    """Divides a weight by a given largest singular value (inference).

    Args:
        w: weight `[..., outputs]` with two axes or more; float or bfloat16.
        sigma: number, as `spectral_norm` returns it; 0 is taken for 1.
        dtype: dtype of the result; None for that of `w`.
        who: the name that error messages give to the caller.

    Returns:
        The weight, of the shape of `w`.

    Raises:
        TypeError: `w` is not floating point, or `dtype` cannot hold the result.
        ValueError: `w` has fewer than two axes.

    Numerics:
        Computes in float32 or wider and rounds once.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> jaxnorm.spectral_norm_inference(jnp.diag(jnp.array([4.0, 1.0])), 4.0).tolist()
        [[1.0, 0.0], [0.0, 0.25]]

    Source:
        Miyato et al. 2018 (arXiv:1802.05957), equation 8.
    """
    w = _real_matrix(w, who)
    dtype = output_dtype(dtype, w.dtype, who)
    wide = w.astype(precision.accumulation_dtype(w.dtype))
    sigma = jnp.asarray(sigma, wide.dtype)
    return (wide / jnp.where(sigma != 0, sigma, jnp.ones_like(sigma))).astype(dtype)


def _real_matrix(w: ArrayLike, who: str) -> jax.Array:
    w = checks.input_array(w, who)
    if precision.is_complex(w.dtype):
        raise TypeError(
            f"{who}: the weight is {w.dtype}{list(w.shape)}, but power iteration is made for real "
            f"weights. Store the real and the imaginary part as two weights."
        )
    if w.ndim < 2:
        raise ValueError(
            f"{who}: a weight of shape {w.shape} is no matrix. Give it one column per output: "
            f"w.reshape(-1, outputs)."
        )
    return w


def _check_steps(n_steps: int, who: str) -> None:
    if not isinstance(n_steps, numbers.Integral):
        raise TypeError(f"{who}: n_steps={n_steps!r} must be an integer. Use n_steps=1.")
    if n_steps < 1:
        raise ValueError(
            f"{who}: n_steps={n_steps} finds no singular value: at least one step of power "
            f"iteration is needed. Use n_steps=1, or leave the weight as it is."
        )


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    # By default some devices multiply matrices in less than float32.
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _length(vector: jax.Array) -> jax.Array:
    """Its length, also where the squares would leave float32."""
    largest = abs(vector).max()
    return largest * jnp.linalg.norm(vector / jnp.where(largest > 0, largest, 1))


def _unit(vector: jax.Array, epsilon: jax.Array) -> jax.Array:
    return vector * lax.rsqrt((vector * vector).sum() + epsilon)


@dataclasses.dataclass(eq=False, repr=False)
class SpectralNorm(WeightSpec):
    """Spectral normalization of a layer's weights, for `jaxnorm.linen` and `jaxnorm.nnx`.

    A wrapper of any layer; a drop-in for Flax's `SpectralNorm`: the same arguments, variables and
    defaults, and in Linen the same results in training. Weights with two axes or more are
    normalized, those with fewer left as they are. Beside each are the statistics `u`, of shape
    (1, outputs), and `sigma`, in float32, or float64 if `param_dtype` is. They hold the result of a
    first power iteration from the start, never change dtype or structure, and no gradient flows
    into them. A weight that is 0 throughout, as biases with two axes in attention are at the start,
    is left as it is from then on, as in Flax: its `u` becomes 0. Normalized, it would jump to a
    length of 1 as soon as it moves. `spectral_norm` itself leaves `u` as it was.

    Args:
        layer_instance: the layer whose weights are normalized.
        n_steps: how many steps of power iteration to make at each training step.
        epsilon: added to squared lengths before vectors are divided by them.
        dtype: dtype of the normalized weight; None infers it from the stored one and `param_dtype`,
            as Flax does.
        param_dtype: see `dtype`.
        error_on_non_matrix: refuse weights with more than two axes instead of reshaping them.
        collection_name: Linen only, the collection of the statistics.
        update_stats: NNX only, whether the layer starts in training; see `train()` and `eval()`.

    Raises:
        TypeError: a weight that is not floating point; a `dtype` that cannot hold the result.
        ValueError: no weight with two axes or more; one with more than two and
            `error_on_non_matrix`; `n_steps` below 1.

    Source:
        Miyato et al. 2018 (arXiv:1802.05957), Algorithm 1.

    Differs:
        From Flax: inference divides by the stored sigma, a constant, and runs no power iteration,
        so that it does not depend on how often it is called; Flax runs one each time and ignores
        the stored sigma. For this to be right before any training, `u` and `sigma` are brought up
        to date when the variables are created; Flax's are not, so a checkpoint of a model that it
        never trained needs one call with `update_stats=True`. A weight keeps its dtype when it is
        stored. `n_steps` below 1 is refused where Flax leaves weights alone. In NNX, a call changes
        no stored weight, and `u` has made one step more than Flax's at the first call.
    """

    n_steps: int = 1
    epsilon: float = 1e-12
    dtype: Any = None
    param_dtype: Any = jnp.float32
    error_on_non_matrix: bool = False

    def _check_options(self, who: str) -> None:
        _check_steps(self.n_steps, who)

    def _leaves_whole(self, shape: tuple[int, ...], who: str) -> bool:
        if len(shape) > 2 and self.error_on_non_matrix:
            raise ValueError(
                f"{who}: has {len(shape)} axes, shape {shape}, but error_on_non_matrix=True allows "
                f"two. Drop it to have the weight taken as a matrix of shape (-1, {shape[-1]})."
            )
        return len(shape) < 2

    def _slots(self, w: jax.Array, who: str) -> dict[str, Slot]:
        normal, ones = jax.nn.initializers.normal(1.0), jax.nn.initializers.ones
        dtype = precision.promote(self.param_dtype, jnp.float32)
        return {
            "u": Slot("batch_stats", (1, w.shape[-1]), dtype, normal),
            "sigma": Slot("batch_stats", (), dtype, ones),
        }

    def _transform(
        self, values: Values, w: jax.Array, who: str, *, update_stats: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        dtype = precision.promote(w.dtype, self.param_dtype) if self.dtype is None else self.dtype
        u, sigma = lax.stop_gradient((values["u"], values["sigma"]))
        if not update_stats:
            return spectral_norm_inference(w, sigma, dtype=dtype, who=who), {}
        options: dict[str, Any] = dict(n_steps=self.n_steps, epsilon=self.epsilon, dtype=dtype)
        normalized, new_u, new_sigma = spectral_norm(w, u[0], who=who, **options)
        new_u = jnp.where(new_sigma != 0, new_u, 0)[None]
        changed = {"u": new_u.astype(u.dtype), "sigma": new_sigma.astype(sigma.dtype)}
        return normalized, lax.stop_gradient(changed)
