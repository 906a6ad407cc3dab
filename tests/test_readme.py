"""What a person reads is true: code in README and docs/ prints what they say, commands work, numbers are those of the runs."""

from __future__ import annotations

import contextlib
import doctest
import html
import importlib.util
import io
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.activations import ACTIVATIONS
from gpubackprop.bench.render import markdown
from gpubackprop.bench.report import read_report
from gpubackprop.losses import LOSSES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))}
FENCES = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LONG = re.compile(" bench | --report ")


def fences(page: str) -> list[tuple[str, str, int, str | None]]:
    """Return the language, text and first line of each block of a page, and the output that a block of text after it shows."""
    text, found = PAGES[page], list(FENCES.finditer(PAGES[page]))
    blocks = []
    for block, after in zip(found, [*found, None][1:], strict=True):
        shown = None
        if after is not None and after[1] == "text" and not text[block.end() : after.start()].strip():
            shown = after[2]
        blocks.append((block[1], block[2], text.count("\n", 0, block.start(2)), shown))
    return blocks


def commands(page: str) -> list[tuple[str, str | None]]:
    """Return the commands of a page, each with the output that is shown for it."""
    found = []
    for language, text, _, shown in fences(page):
        lines = text.splitlines() if language == "sh" else []
        found += [(line, shown if line == lines[-1] else None) for line in lines if line.startswith("gpubackprop ")]
    return found


SHORT = {page: [c for c in commands(page) if not LONG.search(c[0])] for page in PAGES}


def check_output(shown: str | None, printed: str) -> None:
    """Compare printed text with that of a page, where ``...`` stands for anything."""
    same = shown is None or doctest.OutputChecker().check_output(shown, printed, doctest.ELLIPSIS)
    assert same, f"the page says\n{shown}\nand it is\n{printed}"


def write_files(folder: Path) -> None:
    """Write the files that the pages speak of."""
    rng = np.random.default_rng(0)
    rows = [(*rng.normal(3 * (i % 2), 1, 2), ("iris", "rose")[i % 2]) for i in range(60)]
    (folder / "flowers.csv").write_text("long,wide,species\n" + "".join(f"{a},{b},{c}\n" for a, b, c in rows))
    (folder / "new.csv").write_text("wide,long\n" + "".join(f"{b},{a}\n" for a, b, _ in rows))


@pytest.mark.parametrize("page", [page for page in PAGES if any(f[0] == "python" for f in fences(page))])
def test_the_blocks_of_python_run_in_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    try:
        for language, text, line, shown in fences(page):
            if language == "python":
                with contextlib.redirect_stdout(io.StringIO()) as printed:
                    exec(compile("\n" * line + text, page, "exec"), names)
                check_output(shown, printed.getvalue())
    finally:
        ACTIVATIONS.pop("bump", None)
        LOSSES.pop("log_cosh", None)


@pytest.mark.parametrize("page", [page for page in PAGES if SHORT[page]])
def test_the_commands_work_in_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    for command, shown in SHORT[page]:
        status, printed, errors = run(*shlex.split(command)[1:])
        assert status == 0, f"{command}: {errors}"
        check_output(shown, printed)


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for page in PAGES for c, _ in commands(page) if LONG.search(c)])
def test_a_long_command_works(command: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", *shlex.split(command)]
    words += ["--quick"] if "--report" in command else []  # ten minutes otherwise
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr


def test_every_page_has_what_is_looked_for() -> None:
    assert sum(len(SHORT[page]) for page in PAGES) >= 15  # or the expressions above find nothing
    assert sum(shown is not None for page in PAGES for *_, shown in fences(page)) >= 10
    for page in PAGES:
        assert not re.search("^    (gpubackprop|python|make) ", PAGES[page], re.MULTILINE), (
            "a command outside of a block"
        )


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(path: Path) -> None:  # those of docs/ are checked by `make docs`
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


def test_the_makefile_has_what_the_readme_names() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^demo:.*\n\t.*gpubackprop train", makefile, re.MULTILINE)
    assert re.search(r"^test:.*\n(\t.*\n)*\t.*pytest", makefile, re.MULTILINE)
    assert re.search(r"^docs:.*\n(\t.*\n)*\t.*sphinx-build .*-W ", makefile, re.MULTILINE)
    named = {
        name for page in ("README.md", "start.md") for name in re.findall(r"^make ([\w-]+)", PAGES[page], re.MULTILINE)
    }
    assert named == {"demo", "test", "test-all", "docs"}


def test_the_names_in_the_table_of_the_mathematics_exist() -> None:
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
    named = re.findall(r"`(MLP|passes|step|Step|parameters|training)\.(\w+)`", PAGES["mathematics.md"])
    assert len(named) > 8
    for owner, name in named:
        assert hasattr(owners[owner], name)


@pytest.mark.parametrize("name", ["cpu", "fit", "sklearn", "limits"])
def test_a_table_of_times_is_that_of_the_stored_run(name: str) -> None:
    assert markdown(read_report(ROOT / "bench" / "results" / name)) in PAGES["benchmarks.md"]


def test_every_stored_result_is_named() -> None:
    for path in (ROOT / "bench" / "results").rglob("*.*"):
        name = f"bench/results/{path.relative_to(ROOT / 'bench' / 'results').as_posix()}".removesuffix("/report.json")
        assert name in PAGES["benchmarks.md"]


def script(name: str) -> Any:
    """Return a program of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_a_terminal_is_that_of_the_readme() -> None:
    def words(picture: str) -> list[str]:  # how a line is cut into pieces is a matter of rich's version
        return html.unescape("".join(re.findall(r"<text[^>]*>([^<]*)</text>", picture)).replace("\xa0", " ")).split()

    stored = (DOCS / "terminal.svg").read_text(encoding="utf-8")
    assert words(script("terminal").picture(PAGES["README.md"])) == words(stored), "run: python docs/terminal.py"


def test_the_picture_of_the_peers_is_that_of_the_stored_run() -> None:
    peers = script("peers")
    report = json.loads(peers.REPORT.read_text(encoding="utf-8"))
    written = re.findall(r"<text[^>]*>([^<]*)</text>", (DOCS / "peers.svg").read_text(encoding="utf-8"))
    figure = peers.picture(report)
    assert {text.get_text() for ax in figure.axes for text in ax.texts} <= set(written), "run: python docs/peers.py"
    for ax, size in zip(figure.axes, peers.SIZES, strict=True):
        found = peers.times(report, size)
        assert [bar.get_width() for bar in ax.patches] == [value for _, value in found]
        assert [label.get_text() for label in ax.get_yticklabels()] == [name for name, _ in found]
        assert size in written
        assert ("gpubackprop", 1.0) in found
        table = next(line for line in PAGES["benchmarks.md"].splitlines() if line.startswith(f"| {size} |"))
        assert f"| {dict(found)['torch']:.2f}x " in table


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((DOCS / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_ends_in_a_picture_within_a_minute(path: Path, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    words = [sys.executable, "-W", "error", str(path)]
    environment = os.environ | {"MPLBACKEND": "agg"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert (
        resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 60
    )  # of a processor, which others may use, too
    assert all(picture.read_bytes()[:4] == b"\x89PNG" for picture in tmp_path.glob("*.png"))
    assert list(tmp_path.glob("*.png"))


def test_the_reference_has_every_public_name() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.rst"))
    for name in gb.__all__:
        known = name in pages or getattr(getattr(gb, name), "__module__", "gpubackprop") + "\n" in pages
        assert known or name == "__version__", name
