"""Laws of all scripts in `examples/`: they are short, refuse what makes no sense, and run.

What a reproduction measures by itself is tested in `test_example_NAME.py`.
"""

import flax.linen
import jax
import pytest
import quick_runs
from quick_runs import quick_run
from refused_options import OF_ALL, OF_ONE
from scripts import REPRODUCTIONS, SCRIPTS, script

ALONE = {"transformer_memory"}
"""Its quick form compiles for TPUs, in `test_example_transformer_memory.py`."""


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


@pytest.mark.parametrize("name", set(SCRIPTS) - set(REPRODUCTIONS))
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


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in ALONE])
@pytest.mark.usefixtures("quick_compile", "no_pod")
def test_the_quick_form_runs(name, tmp_path, capsys):
    getattr(quick_runs, name)(*quick_run(name, tmp_path))
    printed = " ".join(capsys.readouterr().out.split())
    assert all(text in printed for text in quick_runs.PRINTED.get(name, ())), printed


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_adapting_helps_on_shifted_digits(tmp_path):
    """With as many steps as a quick run makes."""
    _, directions = quick_run("adabn_digits", tmp_path, steps=80)
    for found in directions.values():
        for adapted in ("AdaBN, together", "AdaBN, layer by layer"):
            assert found[adapted][0] > found["source only"][0] + 0.2


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
