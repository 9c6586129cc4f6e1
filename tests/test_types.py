"""What type checkers know of the constructors, as pyright tells."""

import json
import re
import subprocess
import sys

import pytest
from flax import linen as nn
from flax import nnx

import jaxnorm.linen
import jaxnorm.nnx

IMPORTS = """
from flax import linen as nn, nnx
from jaxnorm import linen as jnn
from jaxnorm import nnx as jnx
"""

RIGHT = (
    'jnn.BatchNorm(True, momentum=0.9, epsilon=1e-5, axis_name="d", debias=True, name="norm")',
    "jnn.GroupNorm(num_groups=None, group_size=4)",
    "jnn.LayerNorm(reduction_axes=(1, 2))",
    "jnn.WeightNorm(nn.Dense(3))",
    'jnn.AdaBN(domains=("photos", "sketches"))',
    "jnn.BatchNorm().momentum",
    "jnx.BatchNorm(64, momentum=None, rngs=nnx.Rngs(0))",
    "jnx.GroupNorm(64, num_groups=4, rngs=nnx.Rngs(0))",
)

# Each with a part of what is said of it.
WRONG = {
    'jnn.BatchNorm(momentum="0.9")': '"float | None"',
    "jnn.GroupNorm(num_groups='4')": '"int | None"',
    "jnn.LayerNorm(reduction_axes=1.5)": '"int | Sequence[int]"',
    'jnn.BatchNorm(running_var="unbiassed")': "running_var",
    "jnn.WeightStandardization(3)": '"Module"',
    "jnx.BatchNorm(64)": 'missing for parameter "rngs"',
    'jnx.BatchNorm("64", rngs=nnx.Rngs(0))': '"num_features"',
    "jnn.BatchNorm(True).momentum.upper()": '"upper"',
}


def classes(package, base):
    everything = vars(package).items()
    return [name for name, one in everything if isinstance(one, type) and issubclass(one, base)]


# Whatever there is, a keyword that it does not have is noticed.
WRONG |= {
    f"{short}.{name}(momentun=1)": 'No parameter named "momentun"'
    for short, package, base in (
        ("jnn", jaxnorm.linen, nn.Module),
        ("jnx", jaxnorm.nnx, nnx.Module),
    )
    for name in classes(package, base)
}


@pytest.fixture(scope="module")
def complaints(tmp_path_factory):
    """What pyright says of each line, in one run."""
    page = tmp_path_factory.mktemp("types") / "page.py"
    lines = [*IMPORTS.splitlines(), *RIGHT, *WRONG]
    page.write_text("\n".join(lines))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson"]
    run = subprocess.run([*command, str(page)], stdout=subprocess.PIPE, text=True, check=False)
    said = {}
    for one in json.loads(run.stdout)["generalDiagnostics"]:
        line = lines[one["range"]["start"]["line"]]
        said[line] = said.get(line, "") + one["message"]
    return said


def test_there_are_many_classes():
    assert len(WRONG) > 35


@pytest.mark.parametrize("line", RIGHT)
def test_right_calls_pass(line, complaints):
    assert line not in complaints


@pytest.mark.parametrize("line", WRONG)
def test_wrong_calls_do_not(line, complaints):
    assert re.search(re.escape(WRONG[line]), complaints[line])
