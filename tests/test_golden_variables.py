"""The variables of every layer: names, shapes, dtypes. Checkpoints depend on them, so that a change
has to be meant: `JAXNORM_UPDATE_GOLDEN=1 python -m pytest tests/test_golden_variables.py` writes
`golden_variables.json` anew.

The same trees are saved and restored by Orbax in the middle of training.
"""

import json
import os
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from subjects import ACCUMULATING, BOTH, EACH, SUBJECTS, drawn

GOLDEN = Path(__file__).with_name("golden_variables.json")


def described(subject):
    """As written in the file; the same in both frameworks."""

    def of_layer(framework):
        layer = subject.layer(framework, subject.input())
        collections = {"params": layer.params, "batch_stats": layer.stats}
        return {
            collection: {name: str(jax.typeof(leaf)) for name, leaf in sorted(tree.items())}
            for collection, tree in collections.items()
        }

    found = of_layer("linen")
    assert found == of_layer("nnx")
    return found


def test_variables_are_as_written_down():
    found = {subject.name: described(subject) for subject in (*SUBJECTS, *ACCUMULATING)}
    if os.environ.get("JAXNORM_UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=2) + "\n")
    assert found == json.loads(GOLDEN.read_text())


@EACH
@BOTH
def test_training_goes_on_from_a_checkpoint(framework, subject, tmp_path):
    x = subject.input()
    layer = subject.layer(framework, x)
    step = jax.jit(layer.train)
    params = drawn(layer.params)
    _, stats = step(params, layer.stats, x)
    saved = {"params": params, "batch_stats": stats}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", saved)
        checkpointer.wait_until_finished()
        empty = jax.eval_shape(lambda: {"params": layer.params, "batch_stats": layer.stats})
        restored = checkpointer.restore(tmp_path / "checkpoint", empty)
    chex.assert_trees_all_equal(restored, saved, strict=True)
    found, expected = (
        step(tree["params"], tree["batch_stats"], jnp.sin(x)) for tree in (restored, saved)
    )
    chex.assert_trees_all_equal(found, expected)
