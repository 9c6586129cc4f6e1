"""Laws of all scripts in `examples/`: they are short, refuse what makes no sense, and run.

What a reproduction measures by itself is tested in `test_example_NAME.py`.
"""

import subprocess
import sys

import flax.linen
import jax
import pytest
import quick_runs
from quick_runs import quick_run
from refused_options import OF_ALL, OF_ONE
from scripts import REPRODUCTIONS, SCRIPTS, script

LONG = {
    "adabn_digits",
    "batch_size",
    "before_or_after",
    "population_statistics",
    "weight_norms",
    "where_the_benefit_comes_from",
}
"""Scripts that compile many networks: `-m slow`, of which `.ci/run` takes all quick runs."""

QUICK = [
    pytest.param(name, marks=pytest.mark.slow if name in LONG else ())
    for name in SCRIPTS
    if name != "transformer_memory"  # which compiles for TPUs, and has this test in its own file
]


@pytest.fixture
def no_pod(monkeypatch):
    """No other processes, also where they could be found; JAX would look before anything else."""

    def initialize():
        raise ValueError("there is no pod")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    # For the processes that a script starts.
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def test_scripts_are_found():
    assert len(REPRODUCTIONS) >= 11
    assert {"batch_norm_digits", "batch_size"} < set(SCRIPTS)
    assert all('if __name__ == "__main__"' in path.read_text() for path in SCRIPTS.values())


@pytest.mark.parametrize("name", sorted(set(SCRIPTS) - set(REPRODUCTIONS)))
def test_what_to_run_first_is_short(name):
    assert len(SCRIPTS[name].read_text().splitlines()) <= 150


def begin(example, options):
    """As the command line does."""
    options.check()
    example.main(options)


@pytest.mark.parametrize("name", SCRIPTS)
def test_impossible_options_are_refused(name, no_pod, monkeypatch):
    """By a sentence that names the option, before any time goes into training."""
    monkeypatch.delenv("JAXNORM_DATA", raising=False)
    example, refusal = script(name), script("parts.command").UsageError
    known = example.Options.__dataclass_fields__.keys()
    usual = {"data": "digits"} if "data" in known else {}
    rows = [(change, message) for change, message in OF_ALL if change.keys() <= known]
    for change, message in rows + OF_ONE[name]:
        options = example.Options(**{**usual, **change})
        with pytest.raises(refusal, match=message):
            begin(example, options)


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.usefixtures("quick_compile", "no_pod")
def test_a_quick_run(name, tmp_path, capsys):
    getattr(quick_runs, name)(*quick_run(name, tmp_path))
    printed = " ".join(capsys.readouterr().out.split())
    assert all(text in printed for text in quick_runs.PRINTED.get(name, ())), printed


def test_what_is_wrong_is_told_in_one_line(monkeypatch, capsys):
    example = script("batch_norm_digits")
    monkeypatch.setattr("sys.argv", ["batch_norm_digits.py", "--steps", "0"])
    with pytest.raises(SystemExit) as ended:
        script("parts.command").run(example.main, example.Options)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --steps must be at least 1, not 0\n"


@pytest.mark.slow
@pytest.mark.usefixtures("no_pod")
def test_a_quick_run_from_the_command_line():
    """With two processes beside the other ways, as with devices that are not those of the tests."""
    command = [sys.executable, SCRIPTS["batch_norm_devices"], "--quick", "--devices", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all agree with one device, to rounding" in done.stdout
    assert "def by_processes(task: Task)" in done.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile", "no_pod")
def test_a_mean_of_means_is_noticed(monkeypatch):
    """What Flax's layer takes on devices with 64 and 3 valid images."""
    monkeypatch.setattr(script("parts.devices_task"), "jnn", flax.linen)
    options = dict(steps=11, batch_size=128, devices=2, ways=("shard_map",))
    example = script("batch_norm_devices")
    assert not example.main(example.Options(**options))


@pytest.mark.parametrize("content", [None, b"not an archive"])
def test_missing_and_broken_data_name_the_way_out(content, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXNORM_DATA", str(tmp_path))
    if content is not None:
        (tmp_path / "mnist.npz").write_bytes(content)
    with pytest.raises(script("parts.command").UsageError, match="--data digits"):
        script("parts.digits").load_dataset("auto", 0)
