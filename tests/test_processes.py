"""Two processes with four devices each give the answer of the whole batch.

The answer is that of the paper in float64 NumPy; `processes_worker.py` is what the processes do.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import oracles
from processes_worker import BIAS, CASES, EPSILON, LOCAL_ROWS, MOMENTUM, PROCESSES, SCALE, rows_of

WORKER = Path(__file__).with_name("processes_worker.py")
SECONDS = 90


def tolerance(case):
    if case.dtype == "bfloat16":
        return dict(rtol=2**-8, atol=1e-5)
    # Of float32 numbers near 1e4, the mean is known to 5e-4, half of their last digit.
    return dict(rtol=1e-3, atol=2e-3) if case.mean else dict(rtol=1e-5, atol=1e-5)


def gradients(x, where, slope):
    """Ioffe & Szegedy 2015, the chain rule of section 3: by input, scale and bias.

    An element that does not count is normalized, but moves neither mean nor variance.
    """
    n = where.sum()
    mean = (x * where).sum(0) / n
    rstd = 1 / np.sqrt((where * (x - mean) ** 2).sum(0) / n + EPSILON)
    xhat = (x - mean) * rstd
    dbias, dscale = slope.sum(0), (slope * xhat).sum(0)
    return SCALE * rstd * (slope - where * (dbias + xhat * dscale) / n), dscale, dbias


def expected(case):
    """The answers for the batch of each group, put together in the order of the devices."""
    x, where, slope = (array.astype(np.float64) for array in rows_of(case))
    found = dict(y=np.zeros_like(x), dx=np.zeros_like(x), dscale=0, dbias=0)
    found |= {name: np.zeros((len(x) // LOCAL_ROWS, x.shape[1])) for name in ("mean", "var")}
    for group in case.groups:
        rows = np.concatenate([np.arange(LOCAL_ROWS) + LOCAL_ROWS * device for device in group])
        valid = where[rows] > 0
        y, _, mean, var = oracles.batch_norm(x[rows], SCALE, BIAS, where=valid, epsilon=EPSILON)
        found["y"][rows] = y
        found["dx"][rows], dscale, dbias = gradients(x[rows], valid, slope[rows])
        found["dscale"] += dscale
        found["dbias"] += dbias
        found["mean"][list(group)] = MOMENTUM * case.mean + (1 - MOMENTUM) * mean
        found["var"][list(group)] = MOMENTUM + (1 - MOMENTUM) * var
    return found


def run_processes(folder):
    """The results of both processes, of which none outlives this; one that fails ends the other."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    files = [folder / f"{process}.npz" for process in range(PROCESSES)]
    running = []
    for process, file in enumerate(files):
        command = [sys.executable, "-W", "error", WORKER, str(port), str(process), file]
        with file.with_suffix(".log").open("w") as log:
            running.append(
                subprocess.Popen(
                    command,
                    env=os.environ | {"JAX_PLATFORMS": "cpu"},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    deadline = time.monotonic() + SECONDS
    codes = [None]
    try:
        while None in codes and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.1)
            codes = [process.poll() for process in running]
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    logs = "\n".join(file.with_suffix(".log").read_text() for file in files)
    assert codes == [0] * PROCESSES, f"exit codes {codes} (None: killed)\n{logs}"
    return [dict(np.load(file)) for file in files]


def test_two_processes_are_one_device(tmp_path):
    for found in run_processes(tmp_path):
        for name, case in CASES.items():
            for what, answer in expected(case).items():
                # The running statistics of all devices, and of jit the one that stands for all.
                seen = np.broadcast_to(found.pop(f"{name}/{what}"), np.shape(answer))
                about = f"{name}: {what}"
                np.testing.assert_allclose(seen, answer, **tolerance(case), err_msg=about)
        assert not found
