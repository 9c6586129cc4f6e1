"""How tools call a user's model, and what they say if it does not take what it is given."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxnorm.tools.adapter.models import Run

Call = Callable[[Any, Any], Any]
"""How a model is called on a batch: a function of both."""


def on_batch(model: Any, batch: Any) -> Any:
    """The call of a tool that is not told another."""
    return model(batch)


def call_of(call: Call, who: str) -> Call:
    """`call`; the one that nobody chose says so if it fails."""
    if call is not on_batch:
        return call

    def called(model: Any, batch: Any) -> Any:
        fix = f"Say how it is called on a batch: call=lambda model, batch: {_likely(batch)}."
        with _Explained(who, (batch,), {}, fix):
            return model(batch)

    return called


def example_call(args: tuple[Any, ...], kwargs: Mapping[str, Any], who: str) -> Run:
    """The call of a model with a user's example."""
    fix = f"Give an example of a call that the model takes: {who}(..., x, train=False)."

    def called(model: Any) -> Any:
        with _Explained(who, args, kwargs, fix):
            return model(*args, **kwargs)

    return called


@dataclasses.dataclass(frozen=True)
class _Explained:
    """A context that says of an error in the model's call that it is one, and what to do.

    Errors of the tool itself, which watches the call, are left as they are.
    """

    who: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    fix: str

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        own = (f"{self.who}:", f"{self.who}, ")
        if not isinstance(error, Exception) or str(error).startswith(own):
            return
        given = [_shown(arg) for arg in self.args]
        given += [f"{name}={_shown(value)}" for name, value in self.kwargs.items()]
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"{self.who}: model({', '.join(given)}) raised {first_line(error)}. {self.fix}"
        ) from error


def first_line(error: Exception) -> str:
    """The kind of an error, and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0].rstrip('.')}"


def _likely(batch: Any) -> str:
    """How a model may be called on a batch that it does not take as it is."""
    if isinstance(batch, Mapping):
        return f"model(batch[{next(iter(batch), 'x')!r}])"
    return "model(batch[0])" if isinstance(batch, tuple | list) else "model(batch, train=False)"


def _shown(value: Any) -> str:
    """A value with shapes and dtypes in the place of its arrays."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, jax.Array | np.ndarray):
            return value
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"

    shown = jax.tree.map(leaf, value)
    return shown if isinstance(shown, str) else str(shown).replace("'", "")
