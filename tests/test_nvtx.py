"""Ranges for a profiler: one for each operation and graph launch, always closed, and nothing where they are off."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.machine.diagnosis import DeviceUnavailableError, installed
from gpubackprop.step.operations import OPERATIONS

pytestmark = pytest.mark.gpu
captured = pytest.mark.skipif(installed("nvmath-python") is None, reason="a captured step needs nvmath-python")


class Timeline:
    """Stands in for CuPy's nvtx module: the names of the ranges, and how many are open."""

    available = True

    def __init__(self) -> None:
        self.names: list[str] = []
        self.open = 0

    def RangePush(self, name: str) -> None:  # noqa: N802  (NVTX's own name)
        self.names.append(name)
        self.open += 1

    def RangePop(self) -> None:  # noqa: N802
        assert self.open > 0
        self.open -= 1

    def take(self) -> list[str]:
        """Return the names so far, all of whose ranges are closed, and begin anew."""
        assert self.open == 0
        names, self.names = self.names, []
        return names


@pytest.fixture
def timeline(monkeypatch: pytest.MonkeyPatch) -> Timeline:
    import cupy

    made = Timeline()
    monkeypatch.setattr(cupy.cuda, "nvtx", made)
    return made


def make(**options: Any) -> Any:
    from gpubackprop.backends.cuda.backend import CudaBackend

    return CudaBackend(0, **options)


def batch() -> tuple[np.ndarray, np.ndarray]:
    return np.ones((16, 6), np.float32), np.arange(16) % 3


def test_each_eager_operation_is_a_range(timeline: Timeline) -> None:
    model = gb.MLP([6, 8, 3], device=make(nvtx=True))
    model.loss_and_gradients(*batch())
    assert timeline.take() == [
        "matmul", "bias_activation_forward", "matmul", "bias_loss", "matmul", "matmul", "bias_activation_backward", "matmul",
    ]  # fmt: skip


@captured
def test_each_operation_is_a_range_where_it_is_captured_and_each_launch_of_the_graph(timeline: Timeline) -> None:
    model = gb.MLP([6, 8, 3], device=make(nvtx=True, epilogues="off"), dropout=0.25)
    run = model.step(16, gb.SGD(0.1, clip_norm=1.0)).compile()
    timeline.take()
    run()
    names = timeline.take()
    assert len(names) == len(run.calls) + 1
    assert names[-1] == "graph launch"
    assert set(names[:-1]) == {
        "matmul", "bias_activation_forward", "bias_loss", "bias_activation_backward", "clip", "advance", "update",
    }  # fmt: skip
    run(run.steps_per_launch + 3)
    assert [name for name in timeline.take() if name == "graph launch"] == ["graph launch"] * 3
    run(3)
    assert timeline.take() == ["graph launch"] * 2
    run.eagerly()
    assert timeline.take() == names[:-1]


@captured
def test_a_product_with_an_epilogue_is_a_range_with_its_own_name(timeline: Timeline) -> None:
    run = gb.MLP([16, 32, 8], "identity", device=make(nvtx=True)).step(24).compile()
    timeline.take()
    run.eagerly()
    assert "bias 24x32x16 float32" in timeline.take()


def test_a_range_is_closed_where_its_operation_raises(timeline: Timeline, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make(nvtx=True)
    zeros = backend.zeros((8,), np.float32)

    def fail(operation: Any) -> Any:
        raise RuntimeError(operation.name)

    monkeypatch.setattr(backend._launches, "of", fail)
    for call in (lambda: backend.clip(zeros, 1.0, zeros.copy()), lambda: backend.normalize_weights(zeros)):
        with pytest.raises(RuntimeError):
            call()
    assert timeline.take() == ["clip", "normalize_weights"]


@pytest.mark.parametrize(("value", "on"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_environment_decides_when_a_backend_is_made(
    value: str | None, on: bool, timeline: Timeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GPUBACKPROP_NVTX", raising=False)
    if value is not None:
        monkeypatch.setenv("GPUBACKPROP_NVTX", value)
    gb.MLP([6, 3], device=make()).forward(batch()[0])
    assert bool(timeline.take()) == on
    gb.MLP([6, 3], device=make(nvtx=not on)).forward(batch()[0])
    assert bool(timeline.take()) != on


def test_off_nothing_stands_between_a_caller_and_an_operation(timeline: Timeline) -> None:
    backend = make(nvtx=False)
    names = list(OPERATIONS)
    assert len(names) > 10
    assert not set(names) & set(vars(backend))
    model = gb.MLP([6, 8, 3], device=backend)
    step = model.step(16, "adam")
    functions = [backend.bind(operation)[0] for operation in step.bound() if operation.name != "matmul"]
    assert set(functions) == {backend._run}
    run = step.compile()
    run()
    assert timeline.take() == []


def test_without_nvtx_the_switch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    monkeypatch.setattr(cupy.cuda, "nvtx", SimpleNamespace(available=False))
    with pytest.raises(DeviceUnavailableError, match="GPUBACKPROP_NVTX"):
        make(nvtx=True)


def test_the_real_module_takes_them() -> None:
    model = gb.MLP([6, 8, 3], device=make(nvtx=True))
    expected = gb.MLP([6, 8, 3], device=make()).loss_and_gradients(*batch())[1].flat
    np.testing.assert_array_equal(model.loss_and_gradients(*batch())[1].flat, expected)
