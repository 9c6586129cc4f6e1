"""`cite`: the papers behind what a model uses, as BibTeX."""

from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from jaxnorm.methods import METHODS, Method
from jaxnorm.methods.papers import Paper


def cite(*what: Any, inputs: Sequence[Any] = (), file: TextIO | None = None, **call: Any) -> None:
    """Prints BibTeX for methods, by name or as a model uses them.

    Args:
        *what: names of classes or functions (`"BatchNorm"`, `"batch_norm"`), these themselves, NNX
            models, or Linen models.
        inputs: what a Linen model is called with, arrays or `jax.ShapeDtypeStruct`; its layers come
            to be only when it is called. Nothing is computed.
        file: where to print; None for the standard output.
        **call: keyword arguments of that call, such as `train=False`.

    Raises:
        ValueError: an unknown name, nothing to cite, or a Linen model without `inputs`.

    Example:
        >>> import jaxnorm
        >>> jaxnorm.cite("LayerNorm")
        @misc{ba2016layer,
          title = {{Layer Normalization}},
          author = {Jimmy Lei Ba and Jamie Ryan Kiros and Geoffrey E. Hinton},
          year = {2016},
          eprint = {1607.06450},
          archivePrefix = {arXiv},
        }
    """
    found: dict[Paper, None] = {}
    for each in what:
        for method in _methods(each, inputs, call):
            found |= dict.fromkeys(method.papers)
    if not found:
        raise ValueError(
            f"cite: found none of the library's methods in {len(what)} arguments. Name some: "
            f"jaxnorm.cite('BatchNorm'), or pass a model that uses them."
        )
    print("\n\n".join(paper.bibtex for paper in found), file=file)


def _methods(what: Any, inputs: Sequence[Any], call: dict[str, Any]) -> list[Method]:
    if isinstance(what, str) or (callable(what) and hasattr(what, "__name__")):
        name = what if isinstance(what, str) else what.__name__
        home = getattr(what, "__module__", None)  # other functions of a method's file
        named = [m for m in METHODS if name in (m.name, m.function.__name__)]
        named = named or [m for m in METHODS if home == m.function.__module__]
        if not named:
            raise ValueError(
                f"cite: no method is called {name!r}. Use one of "
                f"{', '.join(method.name for method in METHODS)}."
            )
        return named
    # Only now is it known that Flax is wanted.
    from jaxnorm.linen.calls import is_module, modules_called
    from jaxnorm.nnx.parts import modules_within

    if is_module(what) and not inputs and not call:
        raise ValueError(
            f"cite: the layers of {type(what).__name__}, a Linen module, are known only when it is "
            f"called. Say with what: jaxnorm.cite(model, inputs=(x,), train=False)."
        )
    if is_module(what):
        return _of_classes(modules_called(what, inputs, call))
    return _of_classes(modules_within(what))


def _of_classes(classes: Iterable[type]) -> list[Method]:
    """Flax's own layers count as well: the name says the method."""
    names = {base.__name__ for cls in classes for base in cls.__mro__}
    return [method for method in METHODS if method.name in names]
