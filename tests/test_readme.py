"""The code in the README runs, and its commands are those that CI runs."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[0])
def test_code_runs(block):
    exec(compile(block, "README.md", "exec"), {})


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


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (REPOSITORY / target).exists(), target
