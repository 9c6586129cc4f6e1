"""How large a transformer fits a TPU: the quick form, the search, and what is read off refusals."""

import importlib.util

import jax
import numpy as np
import pytest
import quick_runs

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiling for TPUs needs libtpu: pip install 'jax[tpu]'",
)


@pytest.fixture
def without_a_tpu(monkeypatch):
    """The script sets these; undone after the test."""
    for name in (
        "TPU_SKIP_MDS_QUERY",
        "TPU_ACCELERATOR_TYPE",
        "TPU_WORKER_HOSTNAMES",
        "ALLOW_MULTIPLE_LIBTPU_LOAD",
    ):
        monkeypatch.setenv(name, "")


@needs_libtpu
@pytest.mark.usefixtures("without_a_tpu")
def test_a_quick_run(tmp_path):
    quick_runs.transformer_memory(*quick_runs.quick_run("transformer_memory", tmp_path))


@needs_libtpu
@pytest.mark.usefixtures("without_a_tpu")
def test_what_fits_has_its_parameters_moments_and_gradients(example):
    options = example.Options(norms=("RMSNorm",), width=128, sequences=1, length=128)
    need = example.need_of("RMSNorm, jaxnorm", 3, options)
    assert need.fits
    parameters = 3 * (12 * 128**2 + 2 * 128) + 128 + 2 * 256 * 128 + 256
    # The state is handed over, and counts once: three arrays each, and the gradients at most.
    assert 3 * 4 * parameters <= need.memory * 2**30 < 30 * 4 * parameters


LINE = dict(slope=0.7, constant=2.0)


def straight(limit, seen):
    """Memory that grows as a line does, and a compiler that takes no more than `limit` blocks."""

    def measure(example, blocks):
        seen.append(blocks)
        return example.Need(LINE["slope"] * blocks + LINE["constant"], fits=blocks <= limit)

    return measure


@pytest.mark.parametrize("limit", [19, 17, 24, 0])  # the line says 19
def test_the_largest_that_fits_is_found_wherever_it_is(example, limit):
    seen = []
    measure = straight(limit, seen)
    needs = {blocks: measure(example, blocks) for blocks in (40, 80)}
    assert example.largest(lambda blocks: measure(example, blocks), needs) == limit
    assert sorted(needs) == sorted(seen)  # nothing is compiled twice
    assert limit + 1 in needs


def test_the_line_is_the_one_through_what_was_refused(example):
    needs = {blocks: example.Need(0.5 * blocks + 3, fits=False) for blocks in (10, 30)}
    assert example.line_through(needs) == pytest.approx((0.5, 3.0))
    assert example.line_through({5: example.Need(9.0, fits=True), **needs}) == pytest.approx(
        (0.5, 3)
    )
    fitting = {blocks: example.Need(2.0 * blocks, fits=True) for blocks in (1, 2)}
    assert example.line_through(fitting) == pytest.approx((2.0, 0.0))


STATE = {"a": jax.ShapeDtypeStruct((2**28,), np.float32)}  # 1 GiB


@pytest.mark.parametrize(
    ("message", "memory"),
    [
        (
            "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (25.50G) exceeds "
            "available HBM (15.75G).",
            26.5,
        ),
        ("RESOURCE_EXHAUSTED: Used 16.50G of 15.75G hbm. Exceeded hbm capacity by 768.0M.", 16.5),
    ],
)
def test_a_refusal_counts_the_state_once(example, message, memory):
    assert example.refused(message, STATE) == pytest.approx(memory)


@pytest.mark.parametrize("message", ["INTERNAL: broken", "RESOURCE_EXHAUSTED: of patience"])
def test_other_failures_are_not_taken_for_refusals(example, message):
    with pytest.raises(RuntimeError, match=r"not for want of memory.*" + message[-8:]):
        example.refused(message, STATE)


def test_without_the_compiler_the_way_out_is_named(example, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(example.UsageError, match=r"pip install 'jax\[tpu\]'"):
        example.main(example.Options())
