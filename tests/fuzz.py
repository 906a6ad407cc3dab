"""The fuzzer: damaged files and hostile arguments, a case by its kind and number, the same in every run.

``python tests/fuzz.py api:cpu 17`` runs one case with its traceback; ``python tests/fuzz.py api:cpu,npz 0 1000`` a thousand of
both in turn.

A case works, with finite results, or raises one of :data:`ERRORS` with a message of one line. :func:`failures` runs many of them
in processes of their own with a limit of memory, and a limit of time for each case: what crashes, hangs or fills the memory is
found, too.
"""

from __future__ import annotations

import faulthandler
import random
import resource
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import fuzz_api
import fuzz_files

import gpubackprop as gb
from gpubackprop.csv_files import read_csv
from gpubackprop.features import Features

ERRORS = (ValueError, TypeError, OSError, MemoryError, gb.DeviceUnavailableError)
SECONDS = 60  # of a case; the slowest compile a kernel
MEMORY = 2 << 30  # bytes that cases may take beside what is there before the first
LONGEST = 1000  # characters of a message; the system's names a path as it is


def run(kind: str, number: int) -> str:
    """Run a case; return what it ended with.

    Raises
    ------
    Exception
        It failed.
    """
    rng = random.Random(f"{kind} {number}")
    name, _, device = kind.partition(":")
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of overflow, which a number of 1e300 may do
            if name == "api":
                fuzz_api.case(rng, device)
            elif name == "model":
                fuzz_files.model(Path(folder), rng, device)
            else:
                fuzz_files.FILES[name](Path(folder), rng)
    except ERRORS as error:
        check_message(error)
        return type(error).__name__
    return "works"


def check_message(error: BaseException) -> None:
    """Assert that an error says something, in one line that can be read."""
    text = str(error)
    assert text.strip(), f"{type(error).__name__} without a message"
    assert "\n" not in text, f"a message of more than one line: {text[:300]}"
    assert len(text) <= LONGEST or isinstance(error, OSError), f"a message of {len(text)} characters: {text[:300]}"


def failures(kinds: str, first: int, count: int) -> tuple[list[str], Counter[str]]:
    """Run ``count`` cases of some kinds in a process of their own, and in another where one ends it.

    Returns
    -------
    found : list of str
        What failed, each with the command that repeats it.
    ends : Counter
        How the others ended.
    """
    found: list[str] = []
    ends: Counter[str] = Counter()
    while count > 0:
        command = [sys.executable, "-u", __file__, kinds, str(first), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        lines = [line.split("\t") for line in done.stdout.splitlines() if line.startswith("case\t")]
        for _, case, outcome, *text in lines:
            if outcome == "FAILED":
                found.append(f"repeat: python tests/fuzz.py {case}\n    {' '.join(text)}")
            elif outcome != "begins":
                ends[outcome] += 1
        begun = sum(outcome == "begins" for _, _, outcome, *_ in lines)
        if done.returncode == 0 and begun == count:
            break
        case = lines[-1][1] if lines else f"{kinds} {first}"
        found.append(
            f"repeat: python tests/fuzz.py {case}\n    ends the process ({done.returncode}): {done.stderr[-1500:]}"
        )
        first, count = first + max(begun, 1), count - max(begun, 1)
    return found, ends


def limit_memory() -> None:
    """Limit the memory of this process to what it has and :data:`MEMORY` more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def warm_up() -> None:
    """Load what reads and fits tables: scikit-learn and Arrow's threads reserve addresses, which are no memory of a case."""
    table = read_csv(b"a,b,y\n1,x,p\n2,,q\n", classification=True, frame=True, missing=True).X
    Features.of(table, standardize=True, missing="median")


def main() -> None:
    """Run one case, or a number of them with two lines for each."""
    kinds, first = sys.argv[1].split(","), int(sys.argv[2])
    if len(sys.argv) == 3:
        print(run(kinds[0], first))
        return
    for kind in kinds:
        if kind.startswith("api"):
            fuzz_api.models(kind.partition(":")[2])
        elif kind == "table":
            warm_up()
    limit_memory()
    for i in range(first, first + int(sys.argv[3])):
        kind, number = kinds[i % len(kinds)], i // len(kinds)
        print("case", f"{kind} {number}", "begins", sep="\t")
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            outcome = run(kind, number)
        except BaseException as error:  # SystemExit as well
            frames = traceback.extract_tb(error.__traceback__)[-4:]
            where = " ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in frames)
            outcome = f"FAILED\t{type(error).__name__}: {' '.join(str(error)[:400].split())} at {where}"
        faulthandler.cancel_dump_traceback_later()
        print("case", f"{kind} {number}", outcome, sep="\t")


if __name__ == "__main__":
    main()
