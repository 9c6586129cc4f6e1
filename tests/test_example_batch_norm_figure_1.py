"""What is measured for figure 1, by hand."""

import numpy as np


def history(example, accuracies, inputs):
    """Of one unit whose percentiles at each look are the rows of `inputs`."""
    return example.History(
        name="made up",
        steps=[25 * (1 + look) for look in range(len(accuracies))],
        test_accuracy=accuracies,
        sigmoid_inputs=list(np.array(inputs, float)[:, :, None]),
    )


def test_the_measures_by_hand(example):
    seen = history(example, [0.5, 0.92, 0.88], [[-1, 0, 1], [-2, 1, 2], [-1, -2, 2]])
    assert example.steps_to_goal(seen) == 50
    assert example.travel(seen) == 3  # from -2 to 1
    assert example.relative_travel(seen) == 1  # spreads of 2, 4 and 3
    assert example.widening(seen) == 2
    never = history(example, [0.1, 0.2], [[0, 1, 2], [0, 1, 2]])
    assert example.steps_to_goal(never) == 50
    assert example.travel(never) == 0
    assert example.widening(never) == 1


def test_findings_follow_the_numbers(example):
    calm = [[-1, 0, 1], [-1.1, 0, 1]]
    wild = [[-1, 0, 1], [-3, 2, 3]]
    good = [history(example, [0.5, 0.95], calm), history(example, [0.91, 0.96], calm)] * 3
    bad = [history(example, [0.1, 0.2], wild), history(example, [0.1, 0.3], wild)] * 3
    found = example.findings_of({False: bad, True: good})
    # Where 0.9 was reached at the last look, and never: the same number of steps.
    assert [one.held for one in found] == [None, True, True, True, True]
    assert [one.held for one in example.findings_of({False: good, True: bad})][1:] == [False] * 4
