"""Times of PyTorch's layers, in a process of their own.

    python -m benchmarks.torch_worker < request.json > answer.json

PyTorch's idle threads go on spinning and would slow whoever is timed next, so this runs when all
others are done, with as many threads. It loads no JAX. Images have their features next to the
batch, as PyTorch's layers want them.
"""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from benchmarks import oracle
from benchmarks.cases import EPSILON, FOR_IMAGES, GROUPS, MOMENTUM, STEPS, Case
from benchmarks.oracle import Errors
from benchmarks.timing import Effort, interleaved


def layer_of(method: str, shape: tuple[int, ...], dtype: str) -> Any:
    """A module for inputs of this shape and dtype, with parameters in float32 where it can."""
    torch: Any = importlib.import_module("torch")
    nn = torch.nn

    features = shape[-1]
    match method:
        case "BatchNorm":
            kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
            return kind(features, EPSILON, 1 - MOMENTUM)
        case "LayerNorm":
            return nn.LayerNorm(features, EPSILON)
        case "RMSNorm":
            # Its native kernel wants parameters of the dtype of the input.
            return nn.RMSNorm(features, EPSILON, dtype=getattr(torch, dtype))
        case "GroupNorm":
            return nn.GroupNorm(GROUPS, features, EPSILON)
        case _:
            return nn.InstanceNorm2d(features, EPSILON, affine=True)


def array(values: Any, method: str, dtype: str) -> Any:
    """A tensor in PyTorch's order of axes."""
    torch: Any = importlib.import_module("torch")

    tensor = torch.from_numpy(values).to(getattr(torch, dtype))
    return tensor.movedim(-1, 1).contiguous() if method in FOR_IMAGES else tensor


def errors(method: str, dtype: str) -> Errors:
    """How far PyTorch's layer is from float64."""

    def back(tensor):
        tensor = tensor.detach().float()
        return (tensor.movedim(1, -1) if method in FOR_IMAGES else tensor).numpy()

    def run(x, dy):
        layer = layer_of(method, x.shape, dtype)
        x, dy = (array(a, method, dtype) for a in (x, dy))
        x.requires_grad_()
        y = layer(x)
        y.backward(dy.to(y.dtype))
        return [back(a) for a in (x, dy, y, x.grad)]

    return oracle.errors_of(method, dtype, run)


def way(case: Case, step: str) -> Callable[[], object]:
    """A step of one layer."""
    torch: Any = importlib.import_module("torch")

    x, dy = (array(a, case.method, case.dtype) for a in oracle.example(case))
    layer = layer_of(case.method, case.shape, case.dtype)

    def train():
        y = layer(x)
        return y, torch.autograd.grad(y, [x, *layer.parameters()], dy.to(y.dtype))

    def evaluate():
        with torch.inference_mode():
            return layer(x)

    if step == "training":
        x.requires_grad_()
        return train
    layer.eval()
    return evaluate


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Errors and times of what was asked for."""
    torch: Any = importlib.import_module("torch")

    torch.set_num_threads(request["threads"])
    effort = Effort(**request["effort"])
    cases = [Case(*case) for case in request["cases"]]
    kinds = dict.fromkeys((case.method, case.dtype) for case in cases)
    return {
        "errors": [(*kind, errors(*kind)) for kind in kinds],
        "times": [
            (case, step, interleaved({"it": way(case, step)}, effort).seconds["it"])
            for case in cases
            for step in STEPS
        ],
    }


def ask(
    cases: list[Case], threads: int, effort: Effort
) -> tuple[dict[tuple[str, str], Errors], dict[tuple[Case, str], list[float]]]:
    """Errors by method and dtype, and seconds by case and step, from a process of their own."""
    request = {"cases": cases, "threads": threads, "effort": asdict(effort)}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.torch_worker"],
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    return (
        {(method, dtype): Errors(*numbers) for method, dtype, numbers in found["errors"]},
        {(Case(*case), step): seconds for case, step, seconds in found["times"]},
    )


if __name__ == "__main__":
    json.dump(answer(json.load(sys.stdin)), sys.stdout)
