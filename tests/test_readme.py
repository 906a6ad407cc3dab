"""The README is true: its code runs, its commands work, its table is that of the stored run."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from gpubackprop.activations import ACTIVATIONS
from gpubackprop.cli import main

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


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code


def test_the_makefile_has_the_two_commands():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^demo:.*\n\t.*gpubackprop train", makefile, re.MULTILINE)
    assert re.search(r"^test:.*\n\t.*pytest", makefile, re.MULTILINE)


def test_the_names_in_the_table_of_the_mathematics_exist():
    import gpubackprop.step
    from gpubackprop import training
    from gpubackprop.mlp import MLP

    for name in re.findall(r"`MLP\.(\w+)`", README):
        assert hasattr(MLP, name)
    assert hasattr(gpubackprop.step.Step, "needs")
    assert hasattr(training, "fit")


def test_the_table_of_times_is_that_of_the_stored_run():
    results = json.loads((ROOT / "bench" / "results" / "cpu_step.json").read_text(encoding="utf-8"))["results"]
    for r in results:
        row = f"| {r['layers']} | {r['batch']} | {r['gpubackprop_over_products']:.2f}"
        assert row in README
