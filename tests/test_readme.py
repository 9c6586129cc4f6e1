"""The code in the README and in the pages of docs runs, and the commands are those of CI."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jaxnorm

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text()


def blocks_of(page):
    """The code of a page: what is shown as Python, and the cells that the site executes."""
    opening = r"^(`{3,})(?:python|\{code-cell\}[^\n]*)\n"
    options = r"(?::[^\n]*\n|---\n.*?^---\n)*"
    block = re.compile(rf"{opening}{options}(.*?)^\1 *$", flags=re.DOTALL | re.MULTILINE)
    return [code for _, code in block.findall(page)]


BLOCKS = blocks_of(README)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[0])
def test_code_runs(block):
    exec(compile(block, "README.md", "exec"), {})


DOCS = REPOSITORY / "docs"
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if blocks_of(page.read_text())]
OF_SITE = [page for page in PAGES if page.read_text().startswith("---\nfile_format: mystnb\n")]
"""Pages that are executed when the site is built, which `.ci/run` does, and not here again."""


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page not in OF_SITE],
    ids=lambda page: str(page.relative_to(DOCS)),
)
def test_code_of_a_page_runs(page, monkeypatch):
    """From top to bottom, in the root of the repository: a block goes on from those before."""
    monkeypatch.chdir(REPOSITORY)
    namespace = {}
    for block in blocks_of(page.read_text()):
        exec(compile(block, block.strip().splitlines()[0], "exec"), namespace)


def steps_to_copy(word):
    (block,) = (block for block in BLOCKS if "def eval_step" in block and word in block)
    namespace = {}
    exec(compile(block, "README.md", "exec"), namespace)
    return namespace


def separable_data():
    x = jax.random.normal(jax.random.key(0), (64, 6))
    return x, (x[:, 0] > 0).astype(jnp.int32)


def test_linen_steps_train():
    steps = steps_to_copy("TrainState")
    x, labels = separable_data()

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(2)(jaxnorm.linen.BatchNorm(use_running_average=not train)(x))

    model = Network()
    state = steps["create_state"](model, jax.random.key(1), x, optax.sgd(0.5))
    before = state.batch_stats
    losses = []
    for _ in range(30):
        state, loss = steps["train_step"](state, x, labels)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    assert all(
        jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).all(), before, state.batch_stats))
    )
    assert (steps["eval_step"](state, x).argmax(-1) == labels).mean() > 0.9


def test_nnx_steps_train():
    steps = steps_to_copy("nnx.jit")
    x, labels = separable_data()
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(jaxnorm.nnx.BatchNorm(6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs))
    optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.Param)
    model.train()
    losses = [float(steps["train_step"](model, optimizer, x, labels)) for _ in range(30)]
    model.eval()
    assert losses[-1] < 0.5 * losses[0]
    assert (steps["eval_step"](model, x).argmax(-1) == labels).mean() > 0.9


def test_there_is_code_for_linen_nnx_and_pure_functions():
    assert len(BLOCKS) >= 3
    for word in ("linen", "nnx", "jaxnorm.batch_norm("):
        assert any(word in block for block in BLOCKS), word


def test_ci_runs_the_commands_of_the_readme():
    commands = re.findall(r"^    (python3 -m venv .*)$", README, flags=re.MULTILINE)
    assert len(commands) == 2
    script = (REPOSITORY / ".ci" / "run").read_text()
    for command in commands:
        assert command in script, command


def test_blocks_of_all_kinds_are_found():
    page = (
        "```python\na\n```\n```bash\nb\n```\n```{code-cell} ipython3\n:tags: [hide-input]\nc\n```\n"
    )
    assert blocks_of(page) == ["a\n", "c\n"]


def test_executed_pages_execute_all_their_code():
    """A page that the site executes has its code in cells, lest a reader misses a part of it."""
    for page in PAGES:
        text = page.read_text()
        assert ("```{code-cell}" in text) == (page in OF_SITE), page
        assert page not in OF_SITE or "\n```python\n" not in text, page
    assert '\nnb_execution_mode = "cache"\n' in (DOCS / "conf.py").read_text()
    assert "-m sphinx -W " in (REPOSITORY / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/devices.md", "docs/kernels.md"])
def test_files_that_are_named_exist(page):
    text = (REPOSITORY / page).read_text()
    for file in re.findall(r"`(?:python )?((?:tests|docs|benchmarks|examples)/[\w/.]+)`", text):
        assert (REPOSITORY / file).exists(), file
