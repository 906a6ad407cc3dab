"""The suite on a GPU: a tiny run with the report that is promised, and its checks."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest

import gpubackprop.bench
from gpubackprop.bench import case as cases
from gpubackprop.bench import report, run, sizes
from gpubackprop.bench.peers import make_peer, make_problem

SETTINGS = cases.Settings(sizes.DRY, (), rounds=2, seconds=0.0, dry=True)

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def device():
    from gpubackprop.bench.devices import Gpu

    return Gpu("cuda:0")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "r"
    command = [
        sys.executable, "-m", "gpubackprop", "bench", "--dry", "--device", "cpu,cuda:0", "--peers", "cupy,sklearn",
        "--dtype", "float32,tf32", "--optimizer", "adam", "--out", str(out),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return out, result.stdout


@pytest.fixture(scope="module")
def rows(tiny):
    return [row for row in report.read_report(tiny[0])["rows"] if row["device"] == "cuda:0"]


def test_the_report_says_what_the_numbers_depend_on(tiny):
    found = report.read_report(tiny[0])
    jsonschema.validate(found, json.loads(Path(gpubackprop.bench.__file__).with_name("schema.json").read_text("utf-8")))
    (gpu,) = found["environment"]["gpus"]
    assert gpu["device"] == "cuda:0"
    assert gpu["l2_bytes"] > 0
    assert gpu["cuda_driver"]
    assert "crossover" not in found  # a dry run knows nothing of time


def test_every_suite_is_measured_and_right(rows):
    assert {row["suite"] for row in rows} == set(sizes.SUITES) - {"memory", "sklearn"}  # which are of the CPU
    for row in rows:
        assert row["wrong"] == {}, row["case"]
        assert row["candidates"], row["case"]


def test_transfers_are_from_pinned_and_from_pageable_memory(rows):
    found = [row for row in rows if row["suite"] == "transfer"]
    assert len(found) == 2
    assert all(set(row["candidates"]) == {"pinned", "pageable"} for row in found)


def test_every_kernel_is_timed_against_a_copy_and_plain_cupy(rows):
    found = [row for row in rows if row["suite"] == "kernels"]
    assert len(found) == 17
    for row in found:
        assert {"gpubackprop", "gpubackprop, eager", "copy of as many bytes", "plain CuPy"} == set(row["candidates"])
        assert row["level"] == "L2"  # two sets of the smallest arrays
        assert row["candidates"]["gpubackprop"]["device_seconds"]["median"] > 0


def test_every_step_is_timed_whole_in_parts_and_against_cupy(rows):
    by_dtype = {row["dtype"]: row for row in rows if row["suite"] == "step"}
    assert set(by_dtype) == {"float32", "tf32"}
    row = by_dtype["float32"]
    ours = {"gpubackprop", "gpubackprop, K steps", "gpubackprop, eager", "products", "products, K steps"}
    parts = {"  forward alone", "  backward alone", "  update alone"}
    assert set(row["candidates"]) == ours | parts | {"cupy"}
    assert row["left_out"]["sklearn"] in ("runs on the CPU only", "not installed")
    assert row["candidates"]["gpubackprop, K steps"]["units"] > 1
    assert row["floor_seconds"] > 0
    assert "written for float32" in by_dtype["tf32"]["left_out"]["cupy"]


def test_a_captured_step_waits_for_nothing_and_allocates_nothing(rows):
    (row,) = [row for row in rows if row["suite"] == "step" and row["dtype"] == "float32"]
    found = row["ledger"]
    assert found["graph_launches"] == 1
    assert found["synchronizations"] == 0
    assert found["allocations"] == 0
    assert len(found["operations"]) <= found["launches"] <= 2 * len(found["operations"])


def test_the_tables_fit_80_columns(tiny):
    lines = [line for line in tiny[1].splitlines() if not line.startswith("wrote ")]  # a path is as long as it is
    assert max(map(len, lines)) <= 80


def test_arrays_of_16_bits_are_compared_in_float64(device):
    import cupy
    import ml_dtypes

    from gpubackprop.bench.kernels import kernels_of

    kernel = next(kernels_of(device.backend, "bfloat16", (2, 2)))
    for dtype in (np.float16, ml_dtypes.bfloat16):
        a = cupy.asarray(np.array([1.5, -2.0], dtype))
        wide = kernel.wide({"a": a, "b": a, "y": cupy.arange(2)})
        assert wide["a"] is wide["b"]
        assert wide["a"].dtype == np.float64
        assert wide["y"].dtype == np.int64
        np.testing.assert_array_equal(cupy.asnumpy(wide["a"]), [1.5, -2.0])


def test_the_crossover_is_measured_and_remembered(device, tmp_path, monkeypatch):
    from gpubackprop import backends
    from gpubackprop.machine import crossover

    monkeypatch.setenv("GPUBACKPROP_CACHE_DIR", str(tmp_path))
    settings = cases.Settings(sizes.DRY, (), rounds=3, seconds=0.0)
    made, said = report.new_report(settings, {"commit": None}, []), []
    run.Run(made, settings, tmp_path / "r", said.append, said.append).measure(["crossover"], [device])
    assert set(made["rows"][0]["candidates"]) == {"cpu", "cuda:0"}
    known = crossover.recall("cuda:0")
    assert known is not None
    assert made["crossover"]["cuda:0"] == (None if known == float("inf") else known)
    assert backends.choose_device((12, 16, 8, 3)) == (
        "cpu" if known > crossover.step_flops((12, 16, 8, 3)) else "cuda:0"
    )


def test_plain_cupy_takes_the_same_steps_as_numpy(device):
    losses = []
    for place, name in (("cpu", "numpy"), ("cuda:0", "cupy")):
        with device.scope():
            peer = make_peer(name, make_problem((12, 16, 8, 3), 16, place, optimizer="adam"))
            for _ in range(8):
                peer.step()
            losses.append(peer.loss())
    np.testing.assert_allclose(*losses, rtol=1e-4)
