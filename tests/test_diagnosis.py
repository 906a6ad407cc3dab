"""Each thing that can keep a CUDA device from being used is named, with a command that fixes this machine."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fake_machine import GOOD, Fake

import gpubackprop as gb
from gpubackprop.machine import cuinit, diagnosis, probe


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(monkeypatch)


def command(problem: str | None) -> list[str]:
    """Return the words of the command that a problem gives: a shell can read it."""
    assert problem is not None
    assert "\n" not in problem
    assert "; run: " in problem
    return shlex.split(problem.partition("; run: ")[2])


def test_a_good_machine_has_no_problem(fake: Fake) -> None:
    assert diagnosis.cuda_problem(0) is None
    assert diagnosis.cuda_problem(1) is None
    assert gb.available_devices() == ["cpu", "cuda:0", "cuda:1"]
    assert diagnosis.compute_capability(1) == (9, 0)


def test_every_fault_of_a_machine_is_found(fake: Fake) -> None:
    fake.machine = GOOD._replace(missing=("nvvm",), found=(("nvrtc", "/lib/libnvrtc.so"),))
    fake.versions |= {"cupy-cuda12x": "14.1.0", "numba-cuda": "0.4.0"}
    found = {each.name: each for each in diagnosis.cuda_findings(1)}
    assert {name: each.state for name, each in found.items()} == {
        "driver": "ok", "CuPy": "wrong", "packages": "wrong", "nvvm": "missing", "nvrtc": "ok", "nvmath-python": "warning",
        "cuda:1": "ok",
    }  # fmt: skip
    assert all(bool(each.command) == (each.state != "ok") for each in found.values())
    assert found["CuPy"].message == diagnosis.cuda_problem(1)  # the first is the one that an error tells
    assert found["nvrtc"].text == "/lib/libnvrtc.so"


def test_after_a_driver_that_fails_nothing_else_is_asked(fake: Fake) -> None:
    fake.machine = diagnosis.Machine(803, 12090)
    assert [(each.name, each.command) for each in diagnosis.cuda_findings()] == [("driver", "sudo reboot")]


def test_a_folder_that_hides_the_driver_is_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/my lib:/usr/local/cuda/lib64/stubs")
    assert cuinit.answer(34).command == "export LD_LIBRARY_PATH='/opt/my lib'"
    monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/local/cuda/compat")
    assert cuinit.answer(804).command == "unset LD_LIBRARY_PATH"
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt")
    assert cuinit.answer(34).command == cuinit.answer(804).command == ""


def test_a_variable_that_hides_the_device_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert cuinit.answer(101).command == cuinit.answer(100).command == "unset CUDA_VISIBLE_DEVICES"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert cuinit.answer(101).command == ""


def test_a_card_without_a_driver_gets_the_command_of_its_system(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_driver", lambda: None)
    monkeypatch.setattr(cuinit.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert str(diagnosis.cuda_problem()).endswith("; run: sudo ubuntu-drivers install")
    monkeypatch.setattr(cuinit, "in_container", lambda: True)
    assert "start the container with 'docker run --gpus all'" in str(diagnosis.cuda_problem())


def test_without_a_driver_it_is_the_driver(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_driver", lambda: None)
    with pytest.raises(gb.DeviceUnavailableError, match=r"no NVIDIA driver .* install the driver, or use device='cpu'"):
        gb.get_backend("cuda")
    assert gb.available_devices() == ["cpu"]


def test_a_device_number_out_of_range_is_an_error_that_lists_the_devices(fake: Fake) -> None:
    with pytest.raises(gb.DeviceUnavailableError, match="device 'cuda:2' does not exist; there is cuda:0, cuda:1"):
        gb.get_backend("cuda:2")


@pytest.mark.parametrize("status", [1, 3, 34, 46, 100, 304, 802, 803, 804, 999, 12345])
def test_what_cuinit_answers_is_told(status: int, fake: Fake) -> None:
    fake.machine = diagnosis.Machine(status, 12090)
    problem = diagnosis.cuda_problem()
    assert problem is not None
    assert f"cuInit answers {status}, CUDA_ERROR_" in problem
    assert gb.available_devices() == ["cpu"]


def test_no_device_names_the_variable_that_hides_it(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.machine = diagnosis.Machine(0, 12090)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert "shows no device; see 'nvidia-smi' and CUDA_VISIBLE_DEVICES, which is '-1'" in str(diagnosis.cuda_problem())


@pytest.mark.parametrize("name", ["NUMBA_ENABLE_CUDASIM", "NUMBA_DISABLE_CUDA"])
def test_a_switch_of_numba_left_set_is_named(name: str, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert f"{name} is set to '1'" in str(diagnosis.cuda_problem())
    assert gb.available_devices() == ["cpu"]


def test_an_old_driver_is_named(fake: Fake) -> None:
    fake.machine = GOOD._replace(version=11040)
    assert "driver is one for CUDA 11.4; update it to 525" in str(diagnosis.cuda_problem())


@pytest.mark.parametrize(
    ("version", "capability", "wheel"),
    [(12020, (8, 0), "cupy-cuda12x"), (13000, (8, 0), "cupy-cuda13x"), (13000, (7, 0), "cupy-cuda12x")],
)
def test_without_cupy_the_one_for_driver_and_card_is_installed(
    version: int, capability: tuple[int, int], wheel: str, fake: Fake
) -> None:
    fake.swap("cupy-cuda12x")
    fake.machine = GOOD._replace(version=version, capabilities=(capability,), architectures=())
    words = command(diagnosis.cuda_problem())
    assert [word.partition("<")[0].partition("!")[0].partition(">")[0] for word in words if "cupy" in word] == [wheel]
    assert all(word.partition("[")[0] != "gpubackprop" for word in words)  # it may not be in any index


@pytest.mark.parametrize(
    ("wheels", "version", "capability", "said", "kept"),
    [
        (["cupy-cuda11x", "cupy-cuda12x"], 12090, (8, 0), "2 CuPy wheels", "cupy-cuda12x"),
        (["cupy-cuda12x", "cupy-cuda13x"], 13000, (8, 0), "2 CuPy wheels", "cupy-cuda13x"),
        (["cupy-rocm-7-0"], 12090, (8, 0), "is not one for CUDA", "cupy-cuda12x"),
        (["cupy-cuda13x"], 12090, (8, 0), "needs a driver for CUDA 13", "cupy-cuda12x"),
        (["cupy-cuda13x"], 13000, (7, 0), "needs compute capability 7.5, this is 7.0", "cupy-cuda12x"),
    ],
)
def test_a_wrong_cupy_goes_before_the_right_one_comes(
    wheels: list[str], version: int, capability: tuple[int, int], said: str, kept: str, fake: Fake
) -> None:
    fake.swap("cupy-cuda12x", **dict.fromkeys(wheels, "14.2.0"))
    fake.machine = GOOD._replace(version=version, capabilities=(capability,))
    problem = diagnosis.cuda_problem()
    words = command(problem)
    assert said in str(problem)
    between = words.index("&&")
    assert "uninstall" in words[:between]
    assert set(wheels) <= set(words[:between])
    assert next(word for word in words[between:] if "cupy" in word).startswith(kept)


@pytest.mark.parametrize("number", ["14.0.0", "14.1.0", "12.3.0"])
def test_a_broken_or_old_cupy_is_replaced_by_itself(number: str, fake: Fake) -> None:
    fake.versions["cupy-cuda12x"] = number
    problem = diagnosis.cuda_problem()
    assert f"CuPy {number}" in str(problem)
    assert any(word.startswith("cupy-cuda12x") for word in command(problem))


@pytest.mark.parametrize(
    ("package", "number", "said"),
    [
        ("numba-cuda", None, "numba-cuda is not installed"),
        ("numba-cuda", "0.4.0", "numba-cuda 0.4.0 is installed, and gpubackprop works with numba-cuda <0.31,>=0.30"),
        ("numba-cuda", "0.31.0", "numba-cuda 0.31.0 is installed"),
        ("cuda-core", None, "cuda-core is not installed"),
        ("cuda-bindings", "13.0.3", "cuda-bindings 13.0.3 is installed, and numba-cuda works with cuda-bindings"),
        ("numpy", "2.6.1", "numpy 2.6.1 is installed, and numba works with numpy <2.6"),
    ],
)
def test_a_package_that_is_missing_or_does_not_fit_is_named(
    package: str, number: str | None, said: str, fake: Fake
) -> None:
    fake.machine = GOOD._replace(version=13000)  # cupy-cuda12x works there, too: no other CuPy comes beside it
    fake.swap(package, **({package: number} if number else {}))
    problem = diagnosis.cuda_problem()
    assert said in str(problem)
    words = command(problem)
    assert not any("cupy" in word for word in words)
    assert any(word.startswith("numba-cuda[cu12]") for word in words)


def test_what_the_package_itself_needs_is_checked_without_the_extras(fake: Fake) -> None:
    fake.needs["gpubackprop"].append("numba>=0.62")
    assert diagnosis.unmet() is None
    fake.versions["numba"] = "0.61.2"
    found = diagnosis.unmet()
    assert found is not None
    assert found.text == "numba 0.61.2 is installed, and gpubackprop works with numba >=0.62"
    words = shlex.split(found.command)
    assert words[-1] == "numba>=0.62"
    assert not any("cuda" in word for word in words)


@pytest.mark.parametrize("library", [*probe.LIBRARIES, "libdevice"])
def test_a_missing_library_is_named_with_its_wheel(library: str, fake: Fake) -> None:
    fake.machine = GOOD._replace(missing=(library,))
    problem = diagnosis.cuda_problem()
    assert f"the CUDA library {library} was not found (wheel nvidia-" in str(problem)
    words = command(problem)
    if library.startswith("cublas"):  # installed, yet its files are gone: installing it once more would do nothing
        assert words[-3:] == ["--force-reinstall", "--no-deps", "nvidia-cublas-cu12==12.9.1"]
    else:
        assert any(word.startswith("cuda-toolkit") for word in words)


def test_a_card_newer_than_the_toolkit_is_named(fake: Fake) -> None:
    fake.machine = GOOD._replace(capabilities=((13, 0),))
    problem = diagnosis.cuda_problem()
    assert "does not know compute capability 13.0, only up to 12.0" in str(problem)
    assert "--upgrade" in command(problem)
    fake.machine = fake.machine._replace(version=13000)  # CUDA 13 may know it: the other CuPy instead
    assert any(word.startswith("cupy-cuda13x") for word in command(diagnosis.cuda_problem()))


def test_commands_are_for_this_environment(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.swap("numba-cuda")
    monkeypatch.setattr(diagnosis, "find_spec", lambda name: object())
    assert command(diagnosis.cuda_problem())[:4] == [sys.executable, "-m", "pip", "install"]
    monkeypatch.setattr(diagnosis, "find_spec", lambda name: None)
    monkeypatch.setattr(diagnosis.shutil, "which", lambda name: "/opt/uv")
    assert command(diagnosis.cuda_problem())[:5] == ["/opt/uv", "pip", "install", "--python", sys.executable]
    monkeypatch.setattr(diagnosis.shutil, "which", lambda name: None)
    assert command(diagnosis.cuda_problem())[:4] == [sys.executable, "-m", "ensurepip", "&&"]


def test_the_driver_is_asked_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "answers.py"
    facts = {"status": 0, "version": 12090, "capabilities": [[8, 6]]}
    script.write_text(f"print('a start-up message')\nprint({json.dumps(facts)!r}, flush=True)\nimport os; os.abort()\n")
    monkeypatch.setattr(diagnosis, "_driver", object)  # it has no cuInit: whoever calls it here fails
    monkeypatch.setattr(diagnosis.probe, "__file__", str(script))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "of this test")
    found = diagnosis.machine()
    assert found.capabilities == ((8, 6),)
    assert found.failure  # of the libraries, which come after the driver
    assert diagnosis.compute_capability() == (8, 6)
    assert diagnosis.cuda_version() == "12.9"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_is_told_of_spawn() -> None:
    code = """
import os, gpubackprop as gb
from gpubackprop.backends import BACKENDS
from gpubackprop.machine import diagnosis
import gpubackprop.backends as backends

class Driver:
    def cuInit(self, flags): return 3 if diagnosis._forked else 0

diagnosis._driver = Driver
backends.cuda_problem = lambda index=0: None
if os.fork() == 0:
    try:
        gb.get_backend("cuda")
    except gb.DeviceUnavailableError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cuInit answers 3, CUDA_ERROR_NOT_INITIALIZED" in done.stdout
    assert "spawn" in done.stdout
