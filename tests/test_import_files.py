"""Files of arrays that `import_torch` reads: what is in them says which they are."""

import json
import pathlib
from functools import partial

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from tool_models import shapes_of_nnx

from jaxnorm.tools.importing.safetensors_file import save_safetensors
from jaxnorm.tools.importing.torch import import_torch

X = jnp.ones((1, 3))
STATE = {"weight": np.ones((2, 3), np.float32), "bias": np.array([0.5, -2.0], ml_dtypes.bfloat16)}


def filled(source):
    return import_torch(shapes_of_nnx(partial(nnx.Linear, 3, 2)), source, X).model


def check_filled(layer):
    assert layer.kernel[...].tolist() == STATE["weight"].T.tolist()
    assert layer.bias[...].tolist() == [0.5, -2.0]


def test_safetensors_files(tmp_path):
    pytest.importorskip("safetensors")
    save_safetensors(STATE, tmp_path / "model.safetensors")
    check_filled(filled(tmp_path / "model.safetensors"))


def write_shards(path, state):
    """One file for each array, and the index of all."""
    file_of = {key: f"{key}.npz" for key in state}
    for key, file in file_of.items():
        np.savez(path.parent / file, **{key: state[key]})
    path.write_text(json.dumps({"metadata": {}, "weight_map": file_of}))


FILES = {
    "model.npz": lambda path, state: np.savez(path, **state),
    "model.safetensors.index.json": write_shards,
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_known_by_what_is_in_them(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    FILES[name](tmp_path / name, STATE | {"bias": STATE["bias"].astype(np.float32)})
    (tmp_path / name).rename(tmp_path / "model")
    check_filled(filled("~/model"))


def test_live_files_of_pytorch(tmp_path):
    """With dtypes that NumPy has not and parameters that need a gradient; in both of its forms."""
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.ones((2, 3), dtype=torch.bfloat16))
    state = {"weight": weight, "bias": torch.tensor([0.5, -2.0])}
    paths = [tmp_path / name for name in ("zip.pt", "old.pth")]
    for path in paths:
        torch.save(state, path, _use_new_zipfile_serialization=path.name == "zip.pt")
    float8 = state | {"bias": state["bias"].to(torch.float8_e5m2)}
    for source in (*paths, float8):
        check_filled(filled(source))
    torch.save({"weight": pathlib.Path("an object")}, paths[0])
    with pytest.raises(ValueError, match=r"^import_torch: PyTorch does not read"):
        filled(paths[0])
