"""The README is true: its code runs, its commands work, its table is that of the stored run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpubackprop.activations import ACTIVATIONS
from gpubackprop.bench.render import markdown
from gpubackprop.bench.report import read_report

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^    (gpubackprop .*)$", README, re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_every_block_of_python_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    finally:
        ACTIVATIONS.pop("bump", None)


LONG = re.compile(" bench | --report ")


@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=pytest.mark.slow) if LONG.search(c) else c for c in COMMANDS]
)
def test_every_command_runs(command, tmp_path):
    words = shlex.split(command)
    before = [c for c in COMMANDS[: COMMANDS.index(command)] if any(c.endswith(f"--out {word}") for word in words)]
    rng = np.random.default_rng(0)
    rows = [(*rng.normal(3 * (i % 2), 1, 2), ("iris", "rose")[i % 2]) for i in range(60)]
    (tmp_path / "flowers.csv").write_text("long,wide,species\n" + "".join(f"{a},{b},{c}\n" for a, b, c in rows))
    (tmp_path / "new.csv").write_text("wide,long\n" + "".join(f"{b},{a}\n" for a, b, _ in rows))
    for each in (*before, command):
        program, *arguments = shlex.split(each)
        if "--report" in arguments:
            arguments.append("--quick")  # ten minutes otherwise
        done = subprocess.run(
            [sys.executable, "-m", program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_the_makefile_has_the_two_commands():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^demo:.*\n\t.*gpubackprop train", makefile, re.MULTILINE)
    assert re.search(r"^test:.*\n(\t.*\n)*\t.*pytest", makefile, re.MULTILINE)


def test_the_names_in_the_table_of_the_mathematics_exist():
    from gpubackprop import mlp, parameters
    from gpubackprop.step import passes, step
    from gpubackprop.training import fit

    owners = {
        "MLP": mlp.MLP,
        "passes": passes,
        "step": step,
        "Step": step.Step,
        "parameters": parameters,
        "training": fit,
    }
    named = re.findall(r"`(MLP|passes|step|Step|parameters|training)\.(\w+)`", README)
    assert len(named) > 8
    for owner, name in named:
        assert hasattr(owners[owner], name)


@pytest.mark.parametrize("name", ["cpu", "limits"])
def test_a_table_of_times_is_that_of_the_stored_run(name):
    assert markdown(read_report(ROOT / "bench" / "results" / name)) in README


def test_every_stored_result_is_named():
    for path in (ROOT / "bench" / "results").rglob("*.*"):
        assert f"bench/results/{path.relative_to(ROOT / 'bench' / 'results')}".removesuffix("/report.json") in README
