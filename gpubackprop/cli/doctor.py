"""``gpubackprop doctor``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gpubackprop.machine.finding import Finding

MINUTES = 10.0


def doctor(
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:1; the CPU, and CUDA where there is a card, by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings in JSON.")] = False,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.zip", help="Check and measure a device, and write all of it into this file."),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="That the report may take: 10.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A report of tiny sizes, to see that it runs.")] = False,
) -> None:
    """Check that this machine computes what it should, and print the command that fixes what is wrong.

    The exit status is 0 if everything works, 1 if something is missing or wrong, and 2 for a mistake on the command line.
    A warning is not wrong, and neither is a machine without a GPU, unless --device cuda asks for one.

    With --report it also checks every activation and loss on the device, measures each operation and compares with other
    libraries, within ten minutes. Ctrl-C keeps what is done. The file has no names of users, hosts or home folders in it.
    """
    if report is not None:
        if as_json:
            raise ValueError("--json goes without --report, which has the findings in doctor.json")
        from gpubackprop.bench.field.run import field_report

        raise typer.Exit(field_report(device, report, MINUTES if minutes is None else minutes, quick=quick))
    if minutes is not None or quick:
        raise ValueError(f"{'--quick' if quick else '--minutes'} is of a report; name its file with --report")
    if not _findings(device, as_json=as_json):
        raise typer.Exit(1)


def _findings(device: str | None, *, as_json: bool) -> bool:
    """Print the findings; return whether nothing is wrong."""
    import json
    from dataclasses import asdict

    from gpubackprop.inspect.doctor import diagnose

    findings = []
    for found in diagnose(device):
        findings.append(found)
        if not as_json:
            print("\n".join(lines_of(found)), flush=True)
    wrong = [found.name for found in findings if found.fails]
    if as_json:
        print(json.dumps({"ok": not wrong, "findings": [asdict(found) for found in findings]}, indent=1))
    verdict = f"something is wrong: {', '.join(wrong)}" if wrong else "all right"
    if wrong or not as_json:
        print(verdict, file=sys.stderr if as_json else sys.stdout)
    return not wrong


def lines_of(found: Finding) -> list[str]:
    """Return a finding as lines for a terminal, the command on a line of its own."""
    import shutil
    import textwrap

    said = "; ".join(part for part in (found.text, found.advice) if part)
    width = max(80, min(160, shutil.get_terminal_size((120, 24)).columns))
    lines = textwrap.wrap(
        f"{found.state:8s} {found.name}: {said}", width, subsequent_indent=" " * 11, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    return [*lines, *([f"{'':11s}run: {found.command}"] if found.command else [])]
