"""Import of PyTorch's state dicts, and export back; PyTorch itself is not needed.

What differs between the two: names (`weight`, `running_mean`), layouts (outputs first, against last
here; the kernels of transposed convolutions are mirrored), and options that a state dict does not
hold: epsilon, momentum, and that PyTorch's running variance has Bessel's correction.
"""

import functools
import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from jaxnorm.tools.adapter.calling import example_call
from jaxnorm.tools.importing.arrays import as_array
from jaxnorm.tools.importing.exporting import export_layers
from jaxnorm.tools.importing.names import Names
from jaxnorm.tools.importing.options import SourceOptions
from jaxnorm.tools.importing.plan import Imported, Source, import_layers
from jaxnorm.tools.importing.torch_files import load_state_dict
from jaxnorm.tools.importing.torch_layers import has_counterpart, read_layer, write_layer


def import_torch(
    model: Any,
    state_dict: Mapping[str, Any] | str | os.PathLike[str],
    *args: Any,
    names: Names | None = None,
    source: SourceOptions | Literal["same"] | None = None,
    channels_first: Mapping[str, bool | tuple[int, ...]] | None = None,
    partial: bool = False,
    **kwargs: Any,
) -> Imported:
    """Fills a model with the parameters and running statistics of a PyTorch model.

    Convolutions, transposed convolutions and dense layers, batch, layer, group, instance and RMS
    norms, and weight and spectral norm around a layer. What is not mapped is listed, never guessed.

    Args:
        model: an `nnx.Module`, or a Linen module bound to its variables, `model.bind(variables)`,
            of the same architecture. Its layers may be ours or Flax's.
        state_dict: arrays by PyTorch's keys, `"layer1.0.bn1.running_mean"`, or the path of a file
            of them: `.safetensors`, the index of several (`.safetensors.index.json`), `.npz`, or
            `.pt`, `.pth`, `.bin` if PyTorch is installed. No code in a file is run.
        *args: the model's call, such as an example batch; only shapes are computed.
        names: by the path of a layer or of a module around layers, its name in PyTorch:
            `{"stem": "conv1", "block1": "layer1.0"}`; or a function from the one to the other. What
            is not named is called alike in both. A tuple of names fills one layer that `nn.scan` or
            `nnx.scan` runs for several. `Tied(("wte.weight", "lm_head.weight"))` names the same
            array twice. A variable of no known layer is named itself, `{"embed/embedding":
            "embed.weight"}`, and taken as it is.
        source: the options that PyTorch's layers had, by kind or path of the layer, where they are
            not its defaults: `{"BatchNorm": dict(epsilon=1e-3)}`, in our words (`momentum` is 1
            minus PyTorch's). `"same"` says that they are those of the model, and compares nothing.
        channels_first: what the order of several feature axes was: `{"head": (64, 7, 7)}` for a
            dense layer behind a flattened image of channels, height, width; `{"norm": True}` for a
            layer norm over these, False for one whose axes lie as in the model.
        partial: whether what does not fit is only reported, and keeps the model's values: for fine
            tuning. Options that differ are an error all the same.
        **kwargs: the model's call; in Linen these say that it is inference, `train=False`.

    Returns:
        The filled model, of the kind of `model`, which stays as it is, and a report: `print` it.

    Raises:
        TypeError: no model with variables; arrays, names or options that are none.
        ValueError: every key that was not used, every variable that was not filled, every shape
            and every option that differs, and values that no layer can have, all at once; a file
            that holds no arrays by name, or objects that only running its code would make.
        FileNotFoundError: no such file.
        ImportError: a file that safetensors or PyTorch reads, which is not installed.

    Numerics:
        Values are copied bit by bit, and rounded only if the model's dtype is narrower; the report
        says so, and how many are NaN or infinite. Refused are values that overflow the model's
        dtype, negative counts, and variances that are negative by epsilon or more. The running
        variance is copied too, with its Bessel correction: of how many values it was is not known.
        It is right in inference; to train on alike, use our layers with `running_var="unbiased"`.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> from flax import nnx
        >>> from jaxnorm.tools import torch_defaults
        >>> from jaxnorm.tools import import_torch
        >>> norm = nnx.BatchNorm(2, **torch_defaults(nnx.BatchNorm), rngs=nnx.Rngs(0))
        >>> state = {"bn.weight": np.ones(2), "bn.bias": np.zeros(2), "bn.running_mean": np.ones(2),
        ...          "bn.running_var": np.full(2, 4.0), "bn.num_batches_tracked": np.array(7)}
        >>> state = {key: np.asarray(leaf, np.float32) for key, leaf in state.items()}
        >>> filled, report = import_torch(norm, state, jnp.ones((1, 2)), names={"": "bn"})
        >>> filled(jnp.full((1, 2), 5.0), use_running_average=True).round(3).tolist()
        [[2.0, 2.0]]

    Differs:
        The count of batches is taken by layers that keep `updates`, and dropped by others.
    """
    who = "import_torch"
    if isinstance(state_dict, str | os.PathLike):
        state_dict = load_state_dict(state_dict, who)
    return import_layers(
        model,
        Source("torch", arrays_of(state_dict, who), functools.partial(read_layer, who=who)),
        example_call(args, kwargs, who),
        names=names,
        source_options=source,
        channels_first=channels_first,
        partial=partial,
        who=who,
    )


def export_torch(
    model: Any,
    *args: Any,
    names: Names | None = None,
    channels_first: Mapping[str, bool | tuple[int, ...]] | None = None,
    **kwargs: Any,
) -> dict[str, np.ndarray]:
    """The state dict that a PyTorch model of the same architecture loads.

    Args:
        model: an `nnx.Module`, or a Linen module bound to its variables.
        *args: the model's call, such as an example batch; only shapes are computed.
        names: by the path of a layer or of a module around layers, its name in PyTorch, as in
            `import_torch`.
        channels_first: what the order of several feature axes is to be, as in `import_torch`; for
            a norm whose variables are flat, their shape, channels first.
        **kwargs: the model's call; in Linen these say that it is inference, `train=False`.

    Returns:
        NumPy arrays of the model's dtypes by PyTorch's keys, which share no memory with the model.
        `save_safetensors` writes them to a file. With PyTorch: `module.load_state_dict({key:
        torch.from_numpy(leaf) for key, leaf in exported.items()})`.

    Raises:
        TypeError: no model with variables; names that are none.
        ValueError: layers that PyTorch has not, all named; names of nothing; two layers that have
            the same name.

    Numerics:
        Values are copied bit by bit, and `import_torch` of the result gives the model back. Only a
        scale that is stored minus 1 is rounded. The running variance goes as it is: a layer with
        `running_var="biased"` had none of PyTorch's Bessel correction.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.tools import export_torch
        >>> dense = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> state = export_torch(dense, jnp.ones((1, 3)), names={"": "fc"})
        >>> {key: leaf.shape for key, leaf in state.items()}
        {'fc.weight': (2, 3), 'fc.bias': (2,)}

    Differs:
        `num_batches_tracked` is there where a layer keeps `updates`; PyTorch starts it at 0 where
        it is not. Spectral norm is refused: we keep sigma, PyTorch a second vector.
    """
    who = "export_torch"
    return export_layers(
        model,
        example_call(args, kwargs, who),
        knows=has_counterpart,
        write=functools.partial(write_layer, who=who),
        names=names,
        channels_first=channels_first,
        who=who,
    )


def arrays_of(state_dict: Any, who: str) -> dict[str, np.ndarray]:
    """The arrays of a state dict, in NumPy.

    Raises:
        TypeError: no mapping, or a value that is no array.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"{who}: the state dict is {type(state_dict).__name__}, but needs arrays by name. Use "
            f"module.state_dict(), or the path of a file of arrays."
        )
    fix = (
        "a .safetensors file, or {key: tensor.detach().cpu().numpy() for key, tensor in "
        "module.state_dict().items()}"
    )
    return {str(key): as_array(leaf, key, who, fix) for key, leaf in state_dict.items()}
