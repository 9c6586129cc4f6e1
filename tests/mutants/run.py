"""Puts faults of one line into the library, one at a time: does a test notice?

    python tests/mutants/run.py [PATTERN] [--jobs N] [--tests DIR]

The faults are in the files `*.diff` beside this one. A row says the file of the library and the
files of tests that should notice, quickest first, by name and wherever they lie below `tests/`;
then the line as it is and with the fault. After `-k` stands, as for pytest, what to try first:

    core/moments.py: test_moments test_laws -k no_values or one_value
    - known = jnp.asarray(self.count) > ddof
    + known = jnp.asarray(self.count) >= ddof

Prints for each fault the test that noticed it. A row is rotten if its line does not stand in the
file exactly once, or if there is no such file of tests. The exit status is 1 unless all are
noticed. With `--tests`, the tests of another checkout are judged, on the library beside them. What
is compiled is kept in `build/mutants_cache`, unless the environment names another folder.
"""

import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

HERE = pathlib.Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
TIME_LIMIT = 3600
"""Seconds after which a fault that makes the tests run on and on is taken for noticed."""

CACHE = {
    "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / "build" / "mutants_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
KILLED, SURVIVED, ROTTEN = "killed", "SURVIVED", "ROTTEN"


class Mutant(NamedTuple):
    """One row.

    Attributes:
        file: of the library, below `jaxnorm/`.
        line: as it is, without indentation.
        fault: what stands in its place.
        tests: names of the files of tests that should notice.
        first: which of their tests are tried before all, as for pytest's `-k`.
    """

    file: str
    line: str
    fault: str
    tests: tuple[str, ...]
    first: str


class Outcome(NamedTuple):
    mutant: Mutant
    state: str
    why: str
    seconds: float = 0.0

    def __str__(self) -> str:
        what = f"{self.state:8} {self.seconds:6.0f} s  {self.mutant.file}: {self.mutant.fault}"
        return f"{what}\n{'':19}{self.why}"


def mutants() -> list[Mutant]:
    found = []
    for path in sorted(HERE.glob("*.diff")):
        for row in re.split(r"\n\s*\n", path.read_text()):
            lines = [line for line in row.splitlines() if line and not line.startswith("#")]
            if lines:
                found.append(_parsed(lines))
    return found


def _parsed(lines: list[str]) -> Mutant:
    head, line, fault = lines
    file, _, tests = head.partition(": ")
    names, _, first = tests.partition(" -k ")
    return Mutant(
        file, line.removeprefix("- "), fault.removeprefix("+ "), tuple(names.split()), first
    )


def tried(mutant: Mutant, tests: pathlib.Path) -> Outcome:
    """Copies the checkout to which `tests` belongs, puts the fault in, and runs the tests."""
    with tempfile.TemporaryDirectory(prefix="mutant_") as folder:
        copy = pathlib.Path(folder) / "checkout"
        shutil.copytree(tests.parent, copy, ignore=shutil.ignore_patterns(".*", "build", "dist"))
        try:
            _put_in(mutant, copy / "jaxnorm" / mutant.file)
            files = [_file_of(name, copy / tests.name) for name in mutant.tests]
        except LookupError as error:
            return Outcome(mutant, ROTTEN, str(error))
        environment = CACHE | os.environ | {"PYTHONPATH": str(copy)}
        _check_import(copy, environment)
        start = time.monotonic()
        for chosen in [["-k", mutant.first], []] if mutant.first else [[]]:
            why = _noticed(["-x", *chosen, *files], copy, environment)
            if why is not None:
                return Outcome(mutant, KILLED, f"by {why}", time.monotonic() - start)
        return Outcome(mutant, SURVIVED, " ".join(mutant.tests), time.monotonic() - start)


def _put_in(mutant: Mutant, path: pathlib.Path) -> None:
    lines = path.read_text().splitlines() if path.exists() else []
    places = [i for i, line in enumerate(lines) if line.strip() == mutant.line]
    if len(places) != 1:
        raise LookupError(f"the line stands there {len(places)} times: {mutant.line}")
    line = lines[places[0]]
    lines[places[0]] = line.replace(mutant.line, mutant.fault)
    path.write_text("\n".join(lines) + "\n")


def _file_of(name: str, tests: pathlib.Path) -> str:
    found = [str(path.relative_to(tests.parent)) for path in tests.rglob(f"{name}.py")]
    if len(found) != 1:
        raise LookupError(f"there are {len(found)} files {name}.py")
    return found[0]


def _check_import(copy: pathlib.Path, environment: dict[str, str]) -> None:
    """Raises unless Python finds the copy, whatever is installed."""
    program = "import importlib.util as util; print(util.find_spec('jaxnorm').origin)"
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=copy, env=environment, text=True, stdout=subprocess.PIPE)
    found = pathlib.Path(run.stdout.strip()).resolve()
    if copy.resolve() not in found.parents:
        raise RuntimeError(f"the tests would import {found} in the place of the copy in {copy}")


def _noticed(arguments: list[str], copy: pathlib.Path, environment: dict[str, str]) -> str | None:
    """The first test that fails, or None if all pass or none is chosen."""
    options = ["-q", "-n", "0", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    try:
        run = subprocess.run(
            command,
            cwd=copy,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIME_LIMIT,
        )
    except subprocess.TimeoutExpired:
        return f"the time limit of {TIME_LIMIT} s"
    if run.returncode in (0, 5):
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", run.stdout, re.MULTILINE)
    return failed[1] if failed else f"a crash: {run.stdout[-500:]}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pattern", nargs="?", default="", help="of the file and the fault")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--tests", type=pathlib.Path, default=HERE.parent, help="of a checkout")
    options = parser.parse_args()
    tests = options.tests.resolve()
    wanted = [m for m in mutants() if re.search(options.pattern, f"{m.file}: {m.fault}")]
    outcomes = []
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        running = [pool.submit(tried, mutant, tests) for mutant in wanted]
        for done in concurrent.futures.as_completed(running):
            outcomes.append(done.result())
            print(outcomes[-1], flush=True)
    counts = {
        state: sum(o.state == state for o in outcomes) for state in (KILLED, SURVIVED, ROTTEN)
    }
    summary = ", ".join(f"{count} {state}" for state, count in counts.items())
    print(f"{len(outcomes)} mutants in {time.monotonic() - start:.0f} s: {summary}")
    return int(counts[KILLED] < len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
