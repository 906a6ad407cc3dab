"""The command ``gpubackprop bench``, with ``compare`` and ``show``."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpubackprop.bench.sizes import DRY, FULL, QUICK, SUITES, Sizes, read_sizes

if TYPE_CHECKING:
    from gpubackprop.bench.case import Settings

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

DTYPES = ("float32", "float64", "float16", "bfloat16", "tf32")


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    *,
    suite: Annotated[str, typer.Option(help=f"Some of {', '.join(SUITES)}.")] = ",".join(SUITES),
    device: Annotated[str, typer.Option(help="cpu,cuda:0; all available by default.")] = "",
    peers: Annotated[
        str, typer.Option(help="Some of numpy, cupy, torch, jax, sklearn, thinc, keras, tinygrad.")
    ] = "all",
    dtype: Annotated[str, typer.Option(help=f"Some of {', '.join(DTYPES)}.")] = "float32",
    threads: Annotated[
        int, typer.Option(help="Threads of the CPU, for all candidates, which are kept to as many processors.", min=1)
    ] = 1,
    optimizer: Annotated[str, typer.Option(help="sgd or adam; the suite fit takes adam.")] = "sgd",
    busy: Annotated[
        bool,
        typer.Option("--busy", help="Time steps and epochs beside a busy program, too; needs --threads 2 or more."),
    ] = False,
    robust: Annotated[
        bool,
        typer.Option(
            "--robust",
            help="Measure each case in several processes, arrays at random addresses, and ours against ours: what is noise.",
        ),
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Few sizes, few rounds: less than 60 seconds.")] = False,
    sizes: Annotated[
        Path | None, typer.Option(help="A TOML file: step = ['784-256-10, batch 128'] and the like.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Samples of each time in a process: 25, with --quick or --robust 9.", min=1)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report.json and report.html.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the report in --out.")] = False,
    dry: Annotated[bool, typer.Option("--dry", hidden=True, help="Tiny sizes, to check that it runs.")] = False,
) -> None:
    """Time the same work on every device and in every peer, check the results, and write a report.

    Wrong results are not timed, and make the exit code 1. Ctrl-C keeps the measurements; --resume continues.
    """
    if context.invoked_subcommand is not None:
        return
    from gpubackprop.bench.sizes import LIBRARIES

    suites = _listed("--suite", suite, SUITES)
    if busy and threads == 1:
        raise ValueError("--busy needs --threads 2 or more: with one, all share one processor with the busy program")
    settings_of: dict[str, Any] = {
        "sizes": _sizes(quick, dry, sizes),
        "libraries": LIBRARIES if peers == "all" else tuple(_listed("--peers", peers, LIBRARIES)) if peers else (),
        "dtypes": tuple(_listed("--dtype", dtype, DTYPES)),
        "optimizer": _listed("--optimizer", optimizer, ("sgd", "adam"))[0],
        "threads": threads,
        "rounds": rounds or (2 if dry else 9 if quick or robust else 25),
        "cold_rounds": 1 if dry else 2 if quick else 5,
        "seconds": 0.0 if dry else 0.003 if quick else 0.01,
        "warm_seconds": 0.0 if dry else 0.5,
        "instances": 1 if not robust else 2 if dry else 3 if quick else 7,
        "busy": busy,
        "quick": quick,
        "dry": dry,
    }
    folder = _folder(out, resume)

    from gpubackprop.bench import threads as limits

    limits.limit(threads)  # before the libraries are loaded

    from gpubackprop.bench.case import Settings, pause_of

    settings = Settings(pause=pause_of(threads, idle=not (quick or dry)), **settings_of)
    raise typer.Exit(_measure(suites, _devices(device), settings, folder, resume))


def _measure(suites: list[str], names: list[str], settings: Settings, folder: Path, resume: bool) -> int:
    from gpubackprop.bench import report as reports
    from gpubackprop.bench.devices import device_of
    from gpubackprop.bench.environment import environment
    from gpubackprop.bench.render import Terminal
    from gpubackprop.bench.run import Run
    from gpubackprop.bench.tables import fits, groups, heading, result, warnings

    devices = [device_of(name, settings.threads) for name in names]
    here = environment(devices, settings.threads)
    report = reports.resumed(folder, settings, here) if resume else reports.new_report(settings, here, sys.argv[1:])
    terminal = Terminal()
    terminal.say(*heading(report), *warnings(report))
    if report["rows"]:
        terminal.say(f"resuming: {len(report['rows'])} cases are in {folder / reports.NAME}")
    Run(report, settings, folder, terminal.show, terminal.say).measure(suites, devices)
    report["environment"]["afterwards"] = environment(devices, settings.threads)
    chosen = {device.name: getattr(device.backend, "epilogue_choices", []) for device in devices}
    report["epilogues"] = {
        name: [dict(vars(choice)) for choice in choices] for name, choices in chosen.items() if choices
    }
    reports.write_report(report, folder)
    terminal.say(
        "", *(fits(rows) for rows in groups(report["rows"]).values() if rows[0]["suite"] == "fit"), result(report)
    )
    return _end(report, folder)


def _end(report: Any, folder: Path) -> int:
    from gpubackprop.bench import report as reports
    from gpubackprop.bench.page import write_page

    write_page(report, folder / "report.html")
    print(f"\nwrote {folder / reports.NAME} and report.html after {report['seconds']:.0f} s")
    if report["interrupted"]:
        print(f"interrupted: the rest is missing; gpubackprop bench --resume --out {folder} continues", file=sys.stderr)
        return 130
    errors = reports.errors(report)
    for error in errors:
        print(error, file=sys.stderr)
    return 1 if errors else 0


@app.command()
def compare(
    reports: Annotated[
        list[Path], typer.Argument(help="Two reports or more, files or folders; the first is the baseline.")
    ],
    threshold: Annotated[float, typer.Option(help="Smaller relative changes are not regressions.")] = 0.05,
) -> None:
    """Compare reports; exit with 1 if something of ours became slower beyond noise."""
    from gpubackprop.bench.compare import compare_reports
    from gpubackprop.bench.report import read_report

    if len(reports) < 2:
        raise ValueError("compare needs two reports or more")
    lines, regressions = compare_reports([read_report(path) for path in reports], threshold)
    print("\n".join(lines))
    raise typer.Exit(1 if regressions else 0)


@app.command()
def show(
    report: Annotated[Path, typer.Argument(help="A report, file or folder.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="One line per case of the steps.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write it as a page.")] = None,
    pictures: Annotated[Path | None, typer.Option(help="Write the plots into this folder, as PNG.")] = None,
) -> None:
    """Print a report again."""
    from gpubackprop.bench import render, tables
    from gpubackprop.bench.page import write_page
    from gpubackprop.bench.plots import write_pictures
    from gpubackprop.bench.report import read_report

    found = read_report(report)
    if html is not None:
        write_page(found, html)
    if pictures is not None:
        write_pictures(found, pictures)
    if markdown:
        print(render.markdown(found))
        return
    terminal = render.Terminal()
    terminal.say(*tables.heading(found), *tables.warnings(found))
    for row in found["rows"]:
        terminal.show(row)


def _listed(option: str, text: str, allowed: tuple[str, ...]) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in allowed:
            raise ValueError(f"{option} has {name!r}; choose from {', '.join(allowed)}")
    return names


def _sizes(quick: bool, dry: bool, path: Path | None) -> Sizes:
    default = DRY if dry else QUICK if quick else FULL
    return default if path is None else {**default, **read_sizes(path)}


def _devices(text: str) -> list[str]:
    from gpubackprop.backends import available_devices

    return text.split(",") if text else available_devices()


def _folder(out: Path | None, resume: bool) -> Path:
    if resume and out is None:
        raise ValueError("--resume continues the report in a folder; name it with --out")
    folder = out or Path(f"bench-{datetime.datetime.now().astimezone():%Y-%m-%d-%H%M%S}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out is {str(folder)!r}, which is a file; name a folder")
    if (folder / "report.json").exists() and not resume:
        raise ValueError(f"{folder / 'report.json'} exists; continue it by --resume, or name another folder")
    return folder
