"""Files of a state dict, read without running code that they hold."""

import importlib
import json
import os
import pathlib
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxnorm.tools.importing.safetensors_file import load_safetensors

SUFFIXES = (".safetensors", ".index.json", ".npz", ".pt", ".pth", ".bin", ".ckpt")


def load_state_dict(path: str | os.PathLike[str], who: str) -> Mapping[str, Any]:
    """The arrays of a file by key; what kind of file it is, its first bytes say.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a directory, a file of another kind, one that is damaged, or one that holds
            more than arrays.
        ImportError: the library that reads it is not installed.
    """
    file = pathlib.Path(path).expanduser()
    if not file.exists():
        raise FileNotFoundError(f"{who}: there is no file {str(file)!r}. Give the path of one.")
    if file.is_dir():
        found = sorted(str(f) for f in file.iterdir() if f.name.endswith(SUFFIXES))
        raise ValueError(
            f"{who}: {str(file)!r} is a directory, with the files {found}. Give the path of one; "
            f"if several hold one model, that of its .index.json, or {{**first, **second}} of "
            f"their arrays."
        )
    with file.open("rb") as opened:
        start = opened.read(9)
    if start[8:] == b"{":
        return load_safetensors(file, who)
    if start[:1] == b"{":
        return _load_shards(file, who)
    if start[:4] == b"PK\x03\x04" and zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as members:
            names = members.namelist()
        if all(name.endswith(".npy") for name in names):
            return _load_npz(file, who)
        if any(name.endswith("/data.pkl") for name in names):
            return _load_torch(file, who)
    # A pickle begins with its protocol.
    if start[:1] == b"\x80":
        return _load_torch(file, who)
    raise ValueError(
        f"{who}: {str(file)!r} is none of {', '.join(SUFFIXES)}, or it is damaged. Open it with "
        f"what wrote it, and give arrays by name: {{'conv1.weight': ...}}."
    )


def _load_npz(file: pathlib.Path, who: str) -> Mapping[str, Any]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"{who}: {str(file)!r} cannot be read without running code: {error}. Write arrays of "
            f"numbers, and whole: np.savez(path, **arrays)."
        ) from error


def _load_torch(file: pathlib.Path, who: str) -> Mapping[str, Any]:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise ImportError(
            f"{who}: {str(file)!r} was written by torch.save, and only PyTorch reads it. Run pip "
            f"install torch; or where it is installed safetensors.torch.save_file(torch.load(path, "
            f"weights_only=True), 'model.safetensors')."
        ) from error
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{who}: PyTorch does not read {str(file)!r} without running code in it: "
            f"{str(error).splitlines()[0]} If you trust the file, load it yourself and give "
            f"module.state_dict()."
        ) from error


def _load_shards(index: pathlib.Path, who: str) -> Mapping[str, Any]:
    """The arrays of several files, of which an index says where each is."""
    try:
        file_of = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{who}: {str(index)!r} does not say which file has which array. Give the index of "
            f"several files, {{'weight_map': {{'conv1.weight': 'model-00001.safetensors'}}}}."
        ) from error
    shards = {name: load_state_dict(index.parent / name, who) for name in set(file_of.values())}
    if lost := [key for key, name in file_of.items() if key not in shards[name]]:
        raise ValueError(
            f"{who}: {str(index)!r} names {lost}, which their files have not. Fetch the files of "
            f"this index anew."
        )
    return {key: shards[name][key] for key, name in file_of.items()}
