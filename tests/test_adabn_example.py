"""The example of adapting to another domain, in its quick form, on the data that need no files."""

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    import adabn_digits

    yield adabn_digits
    sys.path.remove(str(EXAMPLES))


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_adapting_helps_on_shifted_digits(example, tmp_path, capsys):
    options = example.Options(quick=True, data="digits", out=tmp_path / "picture.png")
    result = example.main(options)
    for found in result.directions.values():
        assert found["AdaBN, together"][0] > found["source only"][0] + 0.2
        assert found["AdaBN, layer by layer"][0] > found["source only"][0] + 0.2
    printed = capsys.readouterr().out
    assert "seed 0" in printed
    assert "±" not in printed  # one seed has no deviation
    pixels = image.imread(result.picture)
    assert pixels.shape[1] > 1000
    assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps and --batch-size must be at least 1"),
        ({"seeds": ()}, "--seeds needs one seed or more"),
        ({"out": Path("picture.txt")}, "--out must end in"),
    ],
)
def test_impossible_options_are_refused(example, change, message):
    with pytest.raises(example.UsageError, match=message):
        example.main(example.Options(**{"data": "digits", **change}))


def test_missing_data_names_the_way_out(example, monkeypatch):
    monkeypatch.delenv("JAXNORM_DATA", raising=False)
    with pytest.raises(example.UsageError, match="--data digits"):
        example.main(example.Options(data="mnist"))
