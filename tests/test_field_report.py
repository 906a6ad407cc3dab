"""``gpubackprop doctor --report``: whatever ends a stage or the report itself, what is finished is in the file."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from gpubackprop.bench.field import archive, measure, run
from gpubackprop.bench.field.stages import Stage, stages_of
from gpubackprop.cli import main
from gpubackprop.step import Step

posix = pytest.mark.skipif(os.name != "posix", reason="needs signals")


def stage(name: str, code: str, share: float = 1.0) -> Stage:
    return Stage(name, ("-c", code), share, name)


def stages_in(file: Path) -> dict[str, dict[str, Any]]:
    return {one["stage"]: one for one in json.loads(text_in(file, "stages.json"))["stages"]}


def text_in(file: Path, name: str) -> str:
    with zipfile.ZipFile(file) as opened:
        return opened.read(f"{file.stem}/{name}").decode()


# ---------------------------------------------------------------------- stages that fail


@posix
def test_whatever_ends_a_stage_the_others_run_and_the_reason_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    late = (
        "import time\ntry:\n    print('half', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('written down', flush=True)"
    )
    deaf = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    fakes = [
        stage("fine", "print('all of it')"),
        stage("wrong", "import sys; print('2 of 3 are wrong', file=sys.stderr); sys.exit(1)"),
        stage("crash", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        stage("late", late, 0.0),
        stage("deaf", deaf, 0.0),
        stage("last", "print('still here')"),
    ]
    monkeypatch.setattr(run, "stages_of", lambda *a, **k: iter(fakes))
    monkeypatch.setattr(run, "LEAST_S", 2.0)
    monkeypatch.setattr(run, "GRACE_S", 1.0)
    file = tmp_path / "r.zip"
    assert run.field_report("cpu", file, 1.0) == 1
    found = stages_in(file)
    assert {name: one["state"] for name, one in found.items()} == {
        "fine": "ok", "wrong": "failed", "crash": "failed", "late": "cut", "deaf": "cut", "last": "ok",
    }  # fmt: skip
    assert found["wrong"]["reason"] == "status 1: 2 of 3 are wrong"
    assert found["crash"]["reason"] == "SIGSEGV"
    assert found["late"]["reason"] == "the time limit of 2 s"
    assert text_in(file, "late.log").split("\n")[:2] == ["half", "written down"]
    assert text_in(file, "last.log") == "still here\n"
    assert list(tmp_path.iterdir()) == [file]  # the folder is gone
    assert text_in(file, "summary.txt") in capsys.readouterr().out


def test_without_time_the_rest_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = [stage("first", "pass"), stage("second", "pass")]
    monkeypatch.setattr(run, "stages_of", lambda *a, **k: iter(fakes))
    monkeypatch.setattr(run, "LEAST_S", 60.0)
    assert run.field_report("cpu", tmp_path / "r.zip", 1.0) == 0
    assert [one["state"] for one in stages_in(tmp_path / "r.zip").values()][1] == "not run"


def test_on_a_device_that_cannot_be_used_the_doctor_alone_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = [stage("doctor", "import sys; print('{}'); sys.exit(1)"), stage("check", "pass")]
    monkeypatch.setattr(run, "stages_of", lambda *a, **k: iter(fakes))
    monkeypatch.setattr(run, "cuda_problem", lambda index=0: "no driver")
    assert run.field_report("cuda", tmp_path / "r.zip", 1.0) == 1
    found = stages_in(tmp_path / "r.zip")
    assert (found["doctor"]["state"], found["check"]["state"]) == ("failed", "not run")
    assert found["check"]["reason"] == "cuda:0 cannot be used"


@posix
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 130), ("SIGKILL", -signal.SIGKILL)])
def test_what_ends_the_report_takes_no_finished_stage_along(name: str, status: int, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from gpubackprop.bench.field import run
from gpubackprop.bench.field.stages import Stage
long = "import os, time; print(os.getpid(), flush=True); time.sleep(120)"
run.stages_of = lambda *a, **k: [Stage(n, ("-c", c), 1.0, n) for n, c in (("first", "print(1)"), ("second", long), ("third", ""))]
sys.exit(run.field_report("cpu", Path("r.zip")))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    log, pid = tmp_path / "r.parts" / "second.log", ""
    deadline = time.monotonic() + 90
    while not pid and time.monotonic() < deadline:
        pid = log.read_text() if log.exists() else ""
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    assert process.wait(60) == status
    assert process.stdout is not None
    process.stdout.close()
    found = stages_in(tmp_path / "r.zip")
    assert found["first"]["state"] == "ok"
    assert text_in(tmp_path / "r.zip", "first.log") == "1\n"
    if name == "SIGKILL":
        os.kill(int(pid), signal.SIGKILL)  # nobody was left to end it
        return
    assert (found["second"]["state"], found["second"]["reason"]) == ("cut", "interrupted")
    assert found["third"]["state"] == "not run"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


# ---------------------------------------------------------------------- what is in the file


def test_nothing_personal_is_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    monkeypatch.setenv("LOGNAME", "anna")
    monkeypatch.setattr(platform, "node", lambda: "annas-laptop")
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "a.log").write_text(
        "annas-laptop: 2 processors\n/home/anna/x/y.py, no /home/anna. /home/annabel/z, /tmp/pytest-of-anna/1 and susanna, annas\n"
    )
    (folder / "b.json").write_text('{"host": "annas-laptop", "path": "/home/anna"}')
    (folder / "page.html").write_text("made of the rest")
    archive.pack(folder, tmp_path / "r.zip")
    with zipfile.ZipFile(tmp_path / "r.zip") as opened:
        assert opened.namelist() == ["r/a.log", "r/b.json"]
    assert text_in(tmp_path / "r.zip", "a.log") == (
        "host: 2 processors\n~/x/y.py, no ~. /home/user/z, /tmp/pytest-of-user/1 and susanna, annas\n"
    )
    assert json.loads(text_in(tmp_path / "r.zip", "b.json")) == {"host": "host", "path": "~"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "3"], "--minutes is of a report; name its file with --report"),
        (["--quick"], "--quick is of a report"),
        (["--report", "r.txt"], "name a file that ends with .zip"),
        (["--report", "there.zip"], "'there.zip' exists; name another file"),
        (["--report", "r.zip", "--minutes", "0"], "--minutes is 0"),
        (["--report", "r.zip", "--json"], "--json goes without --report"),
        (["--report", "r.zip", "--device", "tpu"], "--device is 'tpu'; a report is of cpu, cuda or cuda:1"),
    ],
)
def test_mistakes_are_named_before_anything_is_made(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.zip").write_text("")
    monkeypatch.setattr(sys, "argv", ["gpubackprop", "doctor", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there.zip"]


def report(device: str, file: Path, *options: str) -> tuple[int, str]:
    """Run the command as a user does."""
    command = [
        sys.executable,
        "-m",
        "gpubackprop",
        "doctor",
        "--device",
        device,
        "--report",
        file.name,
        "--quick",
        *options,
    ]
    done = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_report_of_the_cpu_ends_in_time(tmp_path: Path) -> None:
    file = tmp_path / "cpu.zip"
    started = time.monotonic()
    status, out = report("cpu", file, "--minutes", "0.25")
    assert status == 0, out
    # the last stage that begins may take what no stage begins without, and be slow to end; so may Python to begin
    assert time.monotonic() - started < 15 + run.LEAST_S + run.GRACE_S + 20
    found = stages_in(file)
    assert list(found) == [one.name for one in stages_of("cpu", tmp_path, all_devices=False, quick=True)]
    assert {one["state"] for one in found.values()} <= {"ok", "cut", "not run"}
    assert "gpubackprop" in text_in(file, "summary.txt")


def check_all_of_it(file: Path, device: str) -> None:
    found = stages_in(file)
    assert {name for name, one in found.items() if one["state"] == "ok"} >= {
        "doctor",
        "check",
        "capture",
        "timeline",
        "step",
    }
    assert json.loads(text_in(file, "doctor.json"))["ok"]
    for name in ("check", "capture", "timeline"):
        rows = [json.loads(line) for line in text_in(file, f"{name}.jsonl").splitlines()]
        assert rows
        assert all(row["ok"] for row in rows)
    [row] = rows
    assert row["clock"] == ("device" if device.startswith("cuda") else "wall")
    assert [one["equation"] for one in row["operations"]][:1] == ["z_1 = X W_1"]
    assert all(one["seconds"]["median"] > 0 for one in row["operations"])
    assert json.loads(text_in(file, "bench-step/report.json"))["rows"]
    text = text_in(file, "summary.txt")
    for part in (
        "DOCTOR",
        "CHECK: 3 of 3",
        "CAPTURE: 3 of 3" if device.startswith("cuda") else "CAPTURE: 1 of 1",
        "TIMELINE",
        "BENCH STEP",
    ):
        assert part in text


@pytest.mark.slow
def test_a_whole_report_of_the_cpu(tmp_path: Path) -> None:
    status, out = report("cpu", tmp_path / "cpu.zip")
    assert status == 0, out
    check_all_of_it(tmp_path / "cpu.zip", "cpu")
    assert "BENCH KERNELS" in out
    assert "BENCH EPOCH" in out


@pytest.mark.gpu
def test_a_report_of_a_gpu(tmp_path: Path) -> None:
    status, out = report("cuda", tmp_path / "gpu.zip", "--minutes", "4")
    assert status == 0, out
    check_all_of_it(tmp_path / "gpu.zip", "cuda:0")


# ---------------------------------------------------------------------- what is measured


def test_a_network_that_fails_is_no_reason_to_lose_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> dict[str, Any]:
        raise RuntimeError("an illegal address")

    def rows(device: str, *, quick: bool) -> measure.Rows:
        yield "a", fails
        yield "b", lambda: {"ok": True}
        yield from [(name, fails) for name in "cdef"]

    monkeypatch.setitem(measure.STAGES, "check", rows)
    monkeypatch.setattr(sys, "argv", ["measure", "check", "cpu", str(tmp_path / "check.jsonl")])
    assert measure.main() == 1
    found = [json.loads(line) for line in (tmp_path / "check.jsonl").read_text().splitlines()]
    assert [(row["case"], row["ok"]) for row in found] == [
        ("a", False),
        ("b", True),
        *((name, False) for name in "cde"),
    ]
    assert "3 failures in a row, the last: RuntimeError: an illegal address" in capsys.readouterr().err


def test_other_bits_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    [(_, row)] = measure.capture("reference", quick=True)
    assert row()["ok"]
    monkeypatch.setattr(Step, "run_eagerly", lambda self: None)
    assert not row()["ok"]


def test_another_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    name, row = next(measure.check("reference", quick=True))
    assert name == "tanh"
    assert row()["ok"]
    monkeypatch.setattr("gpubackprop.inspect.check.bound_of", lambda sizes, n: 0.0)
    assert not row()["ok"]
