"""The main example, in its quick form, on the data that need no files."""

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    import batch_norm_digits

    yield batch_norm_digits
    sys.path.remove(str(EXAMPLES))


def test_batch_norm_learns_where_the_plain_network_does_not_yet(example, tmp_path):
    options = example.Options(quick=True, data="digits", out=tmp_path / "picture.png")
    result = example.main(options)
    assert result.with_norm.final_accuracy >= 0.95
    assert result.without_norm.final_accuracy <= 0.5
    pixels = image.imread(result.picture)
    assert pixels.shape[1] > 1000
    assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1"),
        ({"learning_rate": -1.0}, "--learning-rate must be a positive number"),
        ({"out": Path("picture.txt")}, "--out must end in"),
        ({"batch_size": 5000}, "more than the"),
    ],
)
def test_impossible_options_are_refused(example, change, message):
    with pytest.raises(example.UsageError, match=message):
        example.main(example.Options(**{"data": "digits", **change}))


@pytest.mark.parametrize("content", [None, b"not an archive"])
def test_missing_and_broken_data_name_the_way_out(example, content, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXNORM_DATA", str(tmp_path))
    if content is not None:
        (tmp_path / "mnist.npz").write_bytes(content)
    with pytest.raises(example.UsageError, match="--data digits"):
        example.main(example.Options())


def test_the_nnx_twin_learns(example):
    import batch_norm_digits_nnx

    assert batch_norm_digits_nnx.main(batch_norm_digits_nnx.Options()) >= 0.95
