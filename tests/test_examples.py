"""The examples, in their quick forms, on the data that need no files."""

import contextlib
import os
import signal
import subprocess
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


def test_folding_changes_no_answer_and_takes_no_roots(example):
    import fold_batch_norm

    result = fold_batch_norm.main(fold_batch_norm.Options(quick=True, width=8, blocks=1))
    before, after = result.accuracy
    assert min(before, after) >= 0.7
    assert abs(before - after) <= 0.005
    assert result.changed_answers <= 2
    assert result.roots[0] >= 3
    assert result.roots[1] == 0


def run_on_devices(*command):
    """Runs Python with the examples at hand, on CPU devices that are not those of the tests.

    Returns the exit code, what was printed, and the errors. Nothing that it starts outlives it.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(EXAMPLES)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(
        [sys.executable, *command], env=environment, start_new_session=True, **pipes
    )
    try:
        printed, errors = process.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, printed, errors


def test_all_ways_onto_several_devices_agree():
    command = EXAMPLES / "batch_norm_devices.py", "--quick", "--devices", "4"
    code, printed, errors = run_on_devices(*command)
    assert code == 0, printed + errors
    assert "on each: 64 3 0 0" in " ".join(printed.split())
    assert "all agree with one device, to rounding" in printed
    for way in ("jit", "shard_map", "pmap", "processes"):
        assert f"def by_{way}(task: Task)" in printed
        assert f" {way} " in printed


@pytest.mark.slow
def test_a_mean_of_means_is_noticed():
    """What Flax's layer takes on devices with 64 and 3 valid images."""
    code, printed, errors = run_on_devices(
        "-c",
        "import batch_norm_devices as example, digits_convnet, flax.linen\n"
        "digits_convnet.jnn = flax.linen\n"
        "options = dict(steps=11, batch_size=128, devices=2, ways=('shard_map',))\n"
        "assert not example.main(example.Options(**options))",
    )
    assert code == 0, printed + errors
    assert "more than rounding away from one device: shard_map" in printed


def test_a_batch_that_does_not_fit_the_devices_is_refused():
    command = EXAMPLES / "batch_norm_devices.py", "--batch-size", "100"
    code, printed, errors = run_on_devices(*command)
    assert code == 2, printed + errors
    assert "--batch-size 100 does not fit 8 devices evenly; --batch-size 104 does" in errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1, not 0"),
        ({"batch_size": -1}, "--batch-size must be at least 1"),
        ({"devices": 0}, "--devices must be at least 1"),
        ({"ways": ()}, "--ways needs at least one of jit, shard_map, pmap, processes"),
    ],
)
def test_impossible_options_for_devices_are_refused(example, change, message):
    import batch_norm_devices

    with pytest.raises(example.UsageError, match=message):
        batch_norm_devices.main(batch_norm_devices.Options(**change))
