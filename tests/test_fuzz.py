"""Hostile files and arguments: ten thousand cases, each of which works or ends with one line that says what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import failures

FILES = "npz,csv,idx,architecture,model:reference"
LONG = {
    "npz": 1300, "csv": 1600, "idx": 1000, "architecture": 1500, "model:reference": 700, "model:cpu": 700, "report": 200,
    "api:reference": 1500, "api:cpu": 1500,
}  # fmt: skip
AT_ONCE = 500


def check(kinds: str, first: int, count: int) -> None:
    """Run cases, and see that some of them work: what refuses everything is no test."""
    found, ends = failures(kinds, first, count)
    assert not found, "\n".join([f"{len(found)} of {count} cases of {kinds} failed", *found[:20]])
    assert sum(ends.values()) == count
    assert ends["works"] > 0
    assert sum(ends.values()) - ends["works"] > count // 2


def test_some_damaged_files() -> None:
    check(FILES, 0, 180)


def test_some_hostile_arguments() -> None:
    check("api:cpu,api:reference", 0, 160)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "first"), [(kind, first) for kind, count in LONG.items() for first in range(0, count, AT_ONCE)]
)
def test_ten_thousand_cases(kind: str, first: int) -> None:
    check(kind, first, min(AT_ONCE, LONG[kind] - first))


def test_there_are_ten_thousand() -> None:
    assert sum(LONG.values()) == 10_000


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "count"), [("api:cuda", 60), ("model:cuda", 30)])
def test_hostile_arguments_and_files_on_a_gpu(kind: str, count: int) -> None:
    check(kind, 0, count)


def test_what_crashes_or_raises_is_found_and_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer's own test: a case that ends the process, one of another exception, and one that fills the memory."""
    faults = "import fuzz_files\nkinds = fuzz_files.FILES\n" + (
        "def crash(folder, rng):\n    import os\n    if rng.random() < 0.3: os.abort()\n"
        "def raises(folder, rng): raise KeyError('a')\n"
        "def fills(folder, rng):\n    import numpy\n    numpy.ones(1 << 30)\n"
        "kinds.update(crash=crash, raises=raises, fills=fills)\n"
    )
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{faults}"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found, ends = failures("crash,raises,fills", 0, 15)
    assert sum("raises" in text and "KeyError" in text for text in found) == 5
    assert 0 < sum("fuzz.py crash" in text and "ends the process (-6)" in text for text in found) < 5
    assert ends["MemoryError"] == 5
    repeated = subprocess.run(
        [sys.executable, *found[0].splitlines()[0].split()[2:]], cwd=Path(__file__).parent.parent, capture_output=True
    )
    assert repeated.returncode != 0
