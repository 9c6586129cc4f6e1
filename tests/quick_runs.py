"""The quick forms of scripts: what holds for all of them, and what each is expected to find.

A function for each script, by its name, checks what `main` returned. Laws of `test_examples.py`.
"""

import numpy as np
from matplotlib import image
from scripts import REPRODUCTIONS, script

OPTIONS = {
    "batch_norm_devices": {"steps": 6, "devices": 4, "ways": ("jit", "shard_map", "pmap")},
    "batch_norm_digits": {"steps": 300},
    "batch_size": {"sizes": (32,), "dependent_rate": 0.1},  # one rate shares a compiled step
    "contrast_and_style": {"steps": 12},
    "corrupted_digits": {"target_images": 256},
    "fold_batch_norm": {"width": 8, "blocks": 1},
    "population_statistics": {"momenta": (0.9, 0.99)},
    "whitening": {"width": 16, "group": 4, "rates": (0.5,)},
}
"""Of runs that are quicker still, since compiling takes most of the time."""

TOLD_WITHOUT_SEEDS = {"contrast_and_style": 1, "learning_rates": 1}
"""How many of the findings, from the first on, one seed is enough for."""

PRINTED = {
    "batch_norm_devices": [
        "in the smallest batch, valid images on each: 64 3 0 0",
        "all agree with one device, to rounding",
        *(f"def by_{way}(task: Task)" for way in ("jit", "shard_map", "pmap")),
    ],
    "batch_size": ["A quick run: what follows means nothing."],
}
"""What is told, whatever comes out."""


def quick_run(name, folder, **options):
    """Runs a script as with `--quick`, and checks what holds for all; returns module and result."""
    example, picture = script(name), folder / f"{name}.png"
    known = example.Options.__dataclass_fields__
    given = {"quick": True, "data": "digits", "out": picture, **OPTIONS.get(name, {}), **options}
    given = {key: value for key, value in given.items() if key in known}
    result = example.main(example.Options(**given))
    if "out" in known:
        pixels = image.imread(picture)
        assert pixels.shape[1] > 800
        assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 50
    if name in REPRODUCTIONS:
        assert (result.name, result.about) == (name, example.__doc__)
        assert {len(row) for row in result.rows} == {len(result.headings)}
        told = TOLD_WITHOUT_SEEDS.get(name, 0)
        assert all(one.held for one in result.findings[:told])
        assert all(one.held is None for one in result.findings[told:])
    return example, result


def numbers(report, column):
    """A column of the table of a report."""
    return np.array([float(row[column].split()[0]) for row in report.rows])


def adabn_digits(example, directions):
    assert list(directions) == ["digits to shifted digits", "shifted digits to digits"]
    labels = ["batches of 20, N = 0", "batches of 20, N = 16"]
    for found in directions.values():
        assert list(found)[3:] == labels
        for adapted in ("AdaBN, together", "AdaBN, layer by layer"):
            assert found[adapted][0] > found["source only"][0] + 0.2


def batch_norm_devices(example, all_agree):
    assert all_agree


def batch_norm_digits(example, histories):
    without_norm, with_norm = histories
    assert without_norm.test_accuracy[-1] <= 0.5
    assert with_norm.test_accuracy[-1] >= 0.95
    assert with_norm.steps == list(range(25, 301, 25))
    assert with_norm.steps_to_reach(0.9) < 200
    assert without_norm.steps_to_reach(0.9) is None


def batch_norm_digits_nnx(example, accuracy):
    assert accuracy >= 0.95


def batch_norm_figure_1(example, report):
    plain, norm = report.rows
    assert [plain[0], norm[0]] == ["without batch norm", "with batch norm"]
    assert float(norm[2]) > 0.9 > float(plain[2])
    assert float(norm[1]) < float(plain[1]) == 500
    assert len(report.findings) == 5


def batch_size(example, report):
    assert [row[0] for row in report.rows] == list(example.NORMS)
    assert max(numbers(report, 1)) < 60  # chance is 90
    assert numbers(report, 2).shape == (4,)


def before_or_after(example, report):
    places = [(one, place) for one in example.ACTIVATIONS for place in example.PLACES]
    assert [tuple(row[:2]) for row in report.rows] == places
    distances = {}
    for activation, place, _, _, end, distance, change, highest in report.rows:
        if place == "without":
            assert distance == change == ""
        else:
            assert float(end) > 0.9
            assert 0 < float(change) < 1
            assert highest == "0.3"
            distances[activation, place] = float(distance)
    assert distances["ReLU", "after"] > 2 * distances["ReLU", "before"]
    assert len(report.findings) == 12


def contrast_and_style(example, report):
    """Instance norm does not see contrast, and batch norm does."""
    by_name = {row[0]: dict(zip(example.NORMS, row[1:], strict=True)) for row in report.rows}
    assert len(by_name) == len(example.LOOKS) + 2
    for norm in ("instance norm", "IBN-b"):
        same = {by_name[look][norm] for look in ("as trained", *example.AFFINE)}
        assert max(map(float, same)) - min(map(float, same)) <= 0.5  # one or two of 450 images
    moved = {norm: float(found) for norm, found in list(by_name.values())[-1].items()}
    assert moved["instance norm"] < 2 < 20 < moved["batch norm"]


def corrupted_digits(example, report):
    """AdaBN helps against brightness."""
    rows = {row[0]: dict(zip(report.headings, row, strict=True)) for row in report.rows}
    assert len(rows) == 8
    assert float(rows["AdaBN"]["bright"]) < float(rows["as trained"]["bright"]) - 20
    assert float(rows["as trained"]["clean"]) < 30


def fold_batch_norm(example, found):
    before, after = found
    assert min(before.accuracy, after.accuracy) >= 0.7
    assert abs(before.accuracy - after.accuracy) <= 0.005
    assert (before.answers != after.answers).sum() <= 2
    assert before.roots >= 3
    assert after.roots == 0


def learning_rates(example, report):
    # Two rates, two scales, three factors; a column for each of four networks.
    assert (len(report.rows), len(report.headings)) == (2 + 2 + 3, 5)
    assert report.rows[0][0] == "rate 0.1"
    assert report.rows[-1][0] == "30 x the best rate without batch norm"
    assert len(report.findings) == 1 + 2 * 5
    assert float(report.rows[0][4]) > 0.9  # ReLU with batch norm has learnt


def population_statistics(example, report):
    assert [row[1] for row in report.rows] == [
        "average, momentum 0.9",
        "average, momentum 0.99",
        "population",
        "population, 32 images",
        "population, 256 images by 2",
    ]
    early, last = numbers(report, 2), numbers(report, 3)
    assert (early > last).all()
    assert last[2] < 10


def transformer_memory(example, report):
    flax, ours = report.rows
    assert [flax[0], ours[0]] == ["LayerNorm, Flax", "LayerNorm, jaxnorm"]
    assert int(ours[1]) > int(flax[1]) > 0
    assert float(ours[2]) < float(flax[2])
    assert flax[1] in " ".join(report.notes)


def weight_norms(example, report):
    speeds = [(way, "Adam, 32") for way in example.SPEED]
    errors = [(way, f"SGD, {size}") for way in example.ERRORS for size in (32, 2)]
    assert [tuple(row[:2]) for row in report.rows] == speeds + errors
    assert min(numbers(report, 3)) > 0
    assert 0 <= min(numbers(report, 4)) <= max(numbers(report, 4)) <= 100


def where_the_benefit_comes_from(example, report):
    assert [row[0] for row in report.rows] == list(example.QUANTITIES)
    assert len(report.headings) == 4
    assert np.isfinite([numbers(report, column) for column in (1, 2, 3)]).all()
    assert len(report.findings) == 10


def whitening(example, report):
    assert [row[0] for row in report.rows] == [
        "batch norm",
        "DBN, groups of 16",
        "IterNorm, groups of 16",
    ]
    assert max(numbers(report, 2)) < 2.3  # it learns: by chance the loss is log 10
    batch_norm, dbn, iter_norm = numbers(report, 6)
    assert dbn < iter_norm < batch_norm
