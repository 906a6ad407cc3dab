"""The command line, a module for each command. Heavy imports are inside the commands that need them."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from gpubackprop._version import __version__
from gpubackprop.bench.cli import app as bench
from gpubackprop.cli import check, doctor, evaluate, explain, export, golden, grade, info, predict, show, train

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"gpubackprop {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Backpropagation through multilayer perceptrons, on the CPU and on CUDA GPUs."""


for command in (
    train.train,
    predict.predict,
    evaluate.evaluate,
    show.show,
    export.export,
    explain.explain,
    golden.golden,
    grade.grade,
    check.check,
    doctor.doctor,
    info.info,
):
    app.command()(command)
app.add_typer(bench, name="bench")


def _terminated(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _arguments(given: list[str]) -> list[str]:
    """Return the arguments with ``train --resume`` alone, which resumes the run in --out, as an empty value.

    Typer has no options with a value that may be left out.
    """
    if given[:1] != ["train"]:
        return given
    return [
        "--resume=" if a == "--resume" and b.startswith("-") else a
        for a, b in zip(given, [*given[1:], "-"], strict=True)
    ]


def main() -> None:
    """Run the command line: a user's mistake is one line on standard error and exit status 2."""
    from gpubackprop.backends import DeviceUnavailableError

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app(_arguments(sys.argv[1:]), prog_name="gpubackprop")
    except (ValueError, TypeError, OSError, DeviceUnavailableError) as error:
        print(f"gpubackprop: {error}", file=sys.stderr)
        sys.exit(2)
    except MemoryError as error:
        print(f"gpubackprop: not enough memory: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
