"""``gpubackprop doctor``: what it finds on machines with faults, and what it says to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_machine import GOOD, Fake, make_driver

import gpubackprop as gb
from gpubackprop.backends.reference import ReferenceBackend
from gpubackprop.cli import main
from gpubackprop.inspect import doctor
from gpubackprop.machine import cache, cuinit, diagnosis, host
from gpubackprop.machine.finding import Finding

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process; return (exit status, standard output, standard error)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gpubackprop", "doctor", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def computes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every device compute, and return those that were asked to."""
    asked: list[str] = []

    def works(device: str) -> Any:
        asked.append(device)
        return iter([Finding(f"{device} step", "ok", "as it should be")])

    monkeypatch.setattr(doctor, "_works", works)
    return asked


def states(out: str) -> dict[str, str]:
    return {found["name"]: found["state"] for found in json.loads(out)["findings"]}


def test_the_cpu_of_this_machine_computes_what_it_should(run: Run) -> None:
    status, out, _ = run("--device", "cpu")
    lines = out.splitlines()
    assert status == 0
    assert lines[-1] == "all right"
    for name in ("gpubackprop", "packages", "cpu kernel", "cpu step"):
        assert any(line.startswith(f"ok       {name}: ") for line in lines)
    assert not any("cuda" in line for line in lines)


def test_a_machine_without_a_gpu_has_nothing_wrong(
    run: Run, computes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "_driver", lambda: None)
    monkeypatch.setattr(cuinit, "cards", list)
    status, out, _ = run()
    assert status == 0
    lines = " ".join(out.split())  # which are as long as the terminal is wide
    assert "skipped cuda: not here: no NVIDIA driver (libcuda) on this machine; install the driver" in lines
    assert computes == ["cpu"]


def test_cuda_that_is_asked_for_and_missing_is_wrong(
    run: Run, computes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "_driver", lambda: None)
    monkeypatch.setattr(cuinit, "cards", list)
    status, out, _ = run("--device", "cuda")
    assert status == 1
    assert out.endswith("something is wrong: driver\n")
    assert computes == []


def test_a_card_that_the_driver_does_not_show_is_wrong_unless_it_is_hidden(
    run: Run, computes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(monkeypatch)
    fake.machine = diagnosis.Machine(100, 12090)
    assert run()[0] == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    status, out, _ = run()
    assert status == 0
    assert "run: unset CUDA_VISIBLE_DEVICES" in out


def test_every_device_is_checked_and_the_packages_once(
    run: Run, computes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(monkeypatch)
    fake.versions["nvmath-python"] = "1.0.0"
    status, out, _ = run("--json")
    assert status == 0
    assert computes == ["cpu", "cuda:0", "cuda:1"]
    assert list(states(out))[-10:] == [
        "cpu step", "driver", "CuPy", "CUDA packages", "nvmath-python", "cuda:0", "cuda:0 dtypes", "cuda:0 step", "cuda:1",
        "cuda:1 dtypes", "cuda:1 step",
    ][-10:]  # fmt: skip
    assert set(states(out).values()) <= {"ok", "warning"}


def test_all_faults_are_listed_with_their_commands(
    run: Run, computes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(monkeypatch)
    fake.machine = GOOD._replace(missing=("cublasLt",), capabilities=((8, 0),))
    fake.versions["numba-cuda"] = "0.4.0"
    status, out, _ = run("--json")
    assert status == 1
    found = json.loads(out)
    assert found["ok"] is False
    faults = {each["name"]: each for each in found["findings"] if each["state"] in ("missing", "wrong", "warning")}
    assert {"CUDA packages", "cublasLt", "nvmath-python"} <= set(faults)
    assert all(
        each["command"].startswith(sys.executable)
        for name, each in faults.items()
        if name in states(out) and "cu" in name
    )
    assert computes == ["cpu"]  # what cannot work is not tried


@pytest.mark.parametrize("arguments", [["--device", "cuda:x"], ["--device", "tpu"], ["--device", "cpu:1"]])
def test_a_device_that_does_not_exist_is_a_mistake(run: Run, arguments: list[str]) -> None:
    status, _, err = run(*arguments)
    assert status == 2
    assert f"unknown device {arguments[1]!r}" in err


# ---------------------------------------------------------------------- a driver that answers what it is told to


@pytest.mark.skipif(sys.platform != "linux", reason="the driver is a shared object of Linux")
@pytest.mark.parametrize(
    ("variables", "state", "said", "command"),
    [
        ({"STUB_INIT": "802"}, "wrong", "CUDA_ERROR_SYSTEM_NOT_READY", "sudo systemctl start nvidia-fabricmanager"),
        ({"STUB_INIT": "34"}, "missing", "CUDA_ERROR_STUB_LIBRARY", "unset LD_LIBRARY_PATH"),
        ({"STUB_COUNT": "0", "CUDA_VISIBLE_DEVICES": ""}, "missing", "shows no device", "unset CUDA_VISIBLE_DEVICES"),
        ({"STUB_VERSION": "11040"}, "wrong", "one for CUDA 11.4", None),
    ],
)
def test_a_driver_with_a_fault_is_diagnosed_from_outside(
    variables: dict[str, str], state: str, said: str, command: str | None, tmp_path: Path
) -> None:
    make_driver(tmp_path / "stubs")
    environment = {
        name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "CUDA_VISIBLE_DEVICES")
    }
    done = subprocess.run(
        [sys.executable, "-m", "gpubackprop", "doctor", "--device", "cuda", "--json"], capture_output=True, text=True,
        env={**environment, "LD_LIBRARY_PATH": str(tmp_path / "stubs"), **variables}, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    driver = json.loads(done.stdout)["findings"][-1]
    assert (driver["name"], driver["state"]) == ("driver", state)
    assert said in driver["text"]
    assert command is None or driver["command"] == command


# ---------------------------------------------------------------------- does it compute


def test_a_device_that_ends_the_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    finding = json.dumps({"name": "x kernel", "state": "ok", "text": "run"})
    python.write_text(f"#!/bin/sh\necho '{finding}'\necho 'illegal address' >&2\nkill -SEGV $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(doctor.sys, "executable", str(python))
    kernel, crash = doctor._works("x")
    assert (kernel.name, kernel.state) == ("x kernel", "ok")
    assert crash.state == "wrong"
    assert "the process that computed on x failed: SIGSEGV: illegal address" in crash.text


def test_a_device_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr(doctor.sys, "executable", str(python))
    monkeypatch.setattr(doctor, "LIMIT_S", 0.2)
    [hang] = doctor._works("x")
    assert hang.state == "wrong"
    assert "took more than" in hang.text


class Off(ReferenceBackend):
    """Computes in float32, products wrong by 1 in a thousand."""

    device = "off"

    def do_matmul(self, o: Any) -> None:
        super().do_matmul(o)
        np.multiply(o.out, 1.001, out=o.out)

    def do_bias_activation_forward(self, o: Any) -> None:
        super().do_bias_activation_forward(o)
        o.out[0, 0] += 1


def test_a_device_that_computes_something_else_is_wrong() -> None:
    gb.register_backend("off", Off)
    try:
        assert doctor._kernel("off").state == "wrong"
        assert doctor._training_step("off").state == "wrong"
    finally:
        gb.backends.BACKENDS.pop("off")
    assert doctor._kernel("reference").state == doctor._training_step("reference").state == "ok"


@pytest.mark.gpu
def test_a_gpu_is_checked(run: Run) -> None:
    status, out, _ = run("--device", "cuda", "--json")
    assert status == 0, out
    found = states(out)
    for name in ("driver", "CuPy", "CUDA packages", "nvrtc", "cuda:0", "cuda:0 kernel", "cuda:0 step"):
        assert found[name] == "ok"


# ---------------------------------------------------------------------- the host


def test_more_threads_than_a_container_may_use_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.linalg.norm(np.eye(2))
    for name in host.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(host, "QUOTA", quota)
    monkeypatch.setattr(host, "usable", lambda: 64)
    quota.write_text("150000 100000\n")
    found = host.threads_finding()
    assert (found.state, found.command) == ("warning", "export OMP_NUM_THREADS=2")
    quota.write_text("max 100000\n")
    assert host.threads_finding().state == "ok"


def test_a_cache_that_is_not_used_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv("GPUBACKPROP_CACHE_DIR", str(folder))
    folder.mkdir(mode=0o700)
    assert cache.cache_finding().state == "ok"
    folder.chmod(0o777)
    assert cache.cache_finding().command == f"chmod go-w {folder}"
    assert str(cache.cache_problem()).endswith(f"; run: chmod go-w {folder}")
    folder.chmod(0o700)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 1 << 20}))
    full = cache.cache_finding()
    assert full.state == "warning"
    assert "only 1 MiB are free" in full.text
    folder.rmdir()
    folder.write_text("")
    assert "is a file" in cache.cache_finding().text
