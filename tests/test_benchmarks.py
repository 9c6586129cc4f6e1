"""The benchmark command: its arithmetic, its oracle, its table of peers, and a quick run of it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks import docs, goals, oracle  # noqa: E402
from benchmarks.__main__ import Options, check  # noqa: E402
from benchmarks.cases import DTYPES, METHODS, Case, cases  # noqa: E402
from benchmarks.layers import LayerResult, errors, residuals  # noqa: E402
from benchmarks.overheads import Stages  # noqa: E402
from benchmarks.peers import FLAX, FLAX_NNX, OURS, OURS_NNX, PEERS  # noqa: E402
from benchmarks.picture import styles_of  # noqa: E402
from benchmarks.report import latest, report  # noqa: E402
from benchmarks.results import Results, fastest_rival, mean_ratio  # noqa: E402
from benchmarks.timing import AGAIN, Effort, Times, interleaved  # noqa: E402

ALWAYS = [peer for peer in PEERS if peer.name in (OURS, OURS_NNX, FLAX, FLAX_NNX)]
BRIEF = Effort(rounds=4, seconds=10.0, fewest=2, shortest=0.0)


def test_rounds_rotate():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleaved(ways, BRIEF)
    measured = calls[6:]  # each was called twice before, to find out how long it takes
    assert "".join(measured) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(seconds) for name, seconds in times.seconds.items()} == dict.fromkeys(
        "abc", 4
    )


def test_time_that_is_up_ends_after_the_fewest_rounds():
    times = interleaved({"a": lambda: None}, Effort(rounds=9, seconds=0.0, fewest=2, shortest=0.0))
    assert len(times.seconds["a"]) == 2


def test_ratios_are_taken_inside_a_round():
    """The machine was ten times slower in the last round, for both."""
    times = Times({"a": [2.0, 4.0, 30.0], "b": [1.0, 2.0, 10.0]})
    assert times.ratio("a", "b") == (2.0, 2.0, 2.5)
    times.add_apart("c", [1.0, 2.0, 3.0])  # of other rounds: over the median of b
    assert times.ratio("c", "b") == (0.75, 1.0, 1.25)


# Each method in one of the dtypes in turn; all of them are in the full sweep.
PAIRS = [
    pytest.param(method, dtype, marks=pytest.mark.slow if (row + column) % 2 else ())
    for row, method in enumerate(METHODS)
    for column, dtype in enumerate(DTYPES)
]


@pytest.mark.parametrize(("method", "dtype"), PAIRS)
def test_peers_agree_with_float64(method, dtype, quick_compile):
    found = {peer.name: errors(peer, method, dtype) for peer in ALWAYS}
    assert all(oracle.agrees(one, dtype) for one in found.values()), found
    assert oracle.is_stable(found[OURS])
    assert oracle.is_stable(found[OURS_NNX])
    if method != "RMSNorm" and dtype == "float32":
        assert not oracle.is_stable(found[FLAX])  # E[x^2] - E[x]^2


def test_the_oracle_has_the_gradient_of_its_output():
    """By central differences, which need no derivative."""
    generator = np.random.default_rng(0)
    for method in METHODS:
        shape = (2, 2, 2, 64) if method == "GroupNorm" else (3, 4, 5)
        x, dy, direction = generator.normal(size=(3, *shape))
        _, dx = oracle.normalized(method, x, dy)
        values = [
            np.sum(dy * oracle.normalized(method, x + sign * 1e-5 * direction, dy)[0])
            for sign in (1, -1)
        ]
        difference = (values[0] - values[1]) / 2e-5
        np.testing.assert_allclose(np.sum(dx * direction), difference, rtol=1e-6)


def test_residuals_are_counted_once():
    case = Case("LayerNorm", "small", "bfloat16")
    held = {peer.name: residuals(peer, case) for peer in ALWAYS}
    assert 1.0 < held[OURS] == held[OURS_NNX] < 1.1
    assert held[FLAX] > 3


def pretended(ratio: float, method: str = "LayerNorm") -> LayerResult:
    """A case in which Flax takes `ratio` times as long."""
    seconds = {OURS: [1.0] * 3, FLAX: [ratio] * 3, FLAX + AGAIN: [ratio * 1.01] * 3}
    temporaries = {OURS: 1.0, FLAX: 2.0}
    return LayerResult(Case(method, "small", "float32"), "training", Times(seconds), temporaries)


@pytest.mark.parametrize(("ratios", "met"), [((1.2, 2.0), True), ((1.2, 1.8), False)])
def test_speed_is_judged_by_its_geometric_mean(ratios, met):
    results = Results(peers=[OURS, FLAX], layers=[pretended(ratio) for ratio in ratios])
    (goal,) = goals.speed(results)
    assert goal.met == met
    assert goal.found.startswith(f"{np.sqrt(np.prod(ratios)):.2f}")


def test_one_slower_case_is_told():
    results = Results(peers=[OURS, FLAX], layers=[pretended(2.0), pretended(0.9, "RMSNorm")])
    goal = goals.never_slower(results)
    assert goal is not None
    assert not goal.met
    assert "slower in 1 of 2" in goal.found
    assert "0.90 (RMSNorm" in goal.found
    assert fastest_rival(results.layers[1]) == (FLAX, (0.9, 0.9, 0.9))
    np.testing.assert_allclose(mean_ratio(results.layers, FLAX), np.sqrt(1.8))


def test_docs_repeat_the_figures_of_a_report(tmp_path):
    results = Results(peers=[OURS, FLAX], absent=["Haiku"], layers=[pretended(2.0)])
    written, page = tmp_path / "2000-01-01-cpu-benchmarks.md", tmp_path / "page.md"
    picture = tmp_path / "shown.png"
    written.write_text(report(results, "a machine", written.with_suffix(".png").name))
    written.with_suffix(".png").write_bytes(b"drawn")
    page.write_text(f"before\n{docs.BEGIN}\nold\n{docs.END}\nafter\n")
    docs.publish(written, page, picture)
    shown = page.read_text()
    assert shown.startswith("before\n")
    assert shown.endswith("after\n")
    assert "old" not in shown
    assert "a machine" in shown
    assert "| training, float32 | 2.00 |" in shown
    assert "(images/benchmarks.png)" in shown
    assert "2000-01-01-cpu-benchmarks.md)" in shown
    assert picture.read_bytes() == b"drawn"
    assert "Not installed, and so not measured: Haiku." in written.read_text()


def test_the_latest_report_is_one_of_this_command(tmp_path):
    assert latest(tmp_path) is None
    for name in ("2000-01-01-cpu-benchmarks", "2000-01-02-cpu-benchmarks"):
        (tmp_path / f"{name}.md").touch()
    for name in ("tpu", "cpu-bandwidth", "cpu-quick", "gpu-bandwidth", "tpu-benchmarks"):
        (tmp_path / f"2000-01-03-{name}.md").touch()
    assert latest(tmp_path) == tmp_path / "2000-01-02-cpu-benchmarks.md"
    assert latest(tmp_path, "tpu") == tmp_path / "2000-01-03-tpu-benchmarks.md"


def test_models_of_many_norms_are_judged_by_the_worst():
    def stages(name, ratio):
        times = Times({OURS: [ratio] * 3, FLAX: [1.0] * 3, FLAX + AGAIN: [1.1] * 3})
        return Stages(name, times, times)

    tracing, compiling = goals.overheads(Results(deep=[stages("one", 0.5), stages("two", 1.28)]))
    assert tracing.found == compiling.found
    assert tracing.found == "0.80 of it; most 1.28 (two); Flax again: up to 1.10"
    assert not tracing.met


def test_quartiles_stand_beside_the_time_of_an_import():
    results = Results(imports=Times({"jaxnorm": [0.01, 0.02, 0.03, 0.05, 0.09]}))
    (goal,) = goals.overheads(results)
    assert goal.found == "30 ms (20, 50)"
    assert "| `import jaxnorm` | 30 ms (20, 50) |" in report(results, "a machine", "")


@pytest.mark.parametrize(("platform", "told"), [("cpu", True), ("gpu", False)])
def test_a_report_tells_where_and_how_long_it_measured(platform, told):
    results = Results(platform=platform, shortest=1e-4)
    text = " ".join(report(results, "a machine", "").split())
    assert ("nothing was run on a GPU" in text) == told
    assert "inside a measurement as to fill 0.1 ms;" in text


def test_every_library_has_a_mark_of_its_own():
    ways = [str(number) for number in range(20)]
    styles = styles_of(ways)
    assert list(styles) == ways
    assert len({*styles.values()}) == 20


def test_docs_show_the_latest_report():
    newest = docs.latest(docs.RESULTS)
    page = docs.PAGE.read_text()
    if newest is None:
        assert "No run is recorded yet" in page
    else:
        assert docs.figures(newest) in page


def test_cases_are_chosen():
    chosen = cases(("LayerNorm", "InstanceNorm"), ("small", "resnet-14"), ("float32",))
    assert [case.label for case in chosen] == [
        "LayerNorm 128x256 float32",
        "InstanceNorm 32x14x14x256 float32",
    ]


def run(*options):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *options],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("BachNorm",)}, "--methods BachNorm: choose of BatchNorm, LayerNorm"),
        ({"rounds": 1}, "--rounds 1: quartiles need at least 2 rounds"),
        ({"quick": True, "rounds": 9}, "--rounds with --quick: a quick run has its own few rounds"),
        ({"quick": True, "seconds": 1.0}, "--seconds with --quick"),
        ({"quick": True, "docs": True}, "--docs with --quick"),
    ],
)
def test_options_in_vain_end_the_program(options, message):
    with pytest.raises(SystemExit, match=message):
        check(Options(**options))
    check(Options(rounds=2))
    check(Options(quick=True))


def test_unknown_names_end_the_program():
    done = run("--methods", "BachNorm")
    assert done.returncode == 1
    assert "--methods BachNorm: choose of BatchNorm, LayerNorm" in done.stderr


@pytest.mark.slow
def test_a_quick_run_writes_report_and_picture(tmp_path):
    out = tmp_path / "quick.md"
    done = run("--quick", "--out", str(out))
    assert done.returncode == 0, done.stderr
    text = out.read_text()
    for heading in ("One layer, training step", "Whole models", "Importing", "Do all compute"):
        assert f"## {heading}" in text
    assert re.search(r"training step of one layer \(Linen\).*\d\.\d\d", text)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_examples_are_the_same_in_every_process():
    """PyTorch's process draws for itself."""
    first = oracle.draw((2, 3), 0)
    np.testing.assert_array_equal(first, oracle.draw((2, 3), 0))
    assert first.dtype == np.float32
    assert jnp.asarray(first).dtype == jax.dtypes.canonicalize_dtype(np.float32)
