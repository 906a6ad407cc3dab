"""The step as data: names, dependencies, FLOP; eager and compiled give the same bits; a warm step allocates no array."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.inspect.explain import random_batch
from gpubackprop.step import Step


def feed(model: gb.MLP, step: Step, rng: np.random.Generator, n: int) -> None:
    """Fill a step's mini-batch."""
    X, y = random_batch(model, n, rng)
    step.names.array("X")[...] = model.backend.asarray(X, model.dtype)
    step.names.array("y")[...] = model.backend.asarray(y)


def test_the_operations_stand_in_the_order_of_the_mathematics() -> None:
    step = gb.MLP([4, 5, 6, 3], device="reference").step(7, gb.Adam(clip_norm=1.0))
    assert [(o.phase, o.name, tuple(buffer.name for buffer in o.written)) for o in step.operations] == [
        ("forward", "matmul", ("z_1",)),
        ("forward", "bias_activation_forward", ("h_1",)),
        ("forward", "matmul", ("z_2",)),
        ("forward", "bias_activation_forward", ("h_2",)),
        ("forward", "matmul", ("o",)),
        ("loss", "bias_loss", ("loss", "do", "db_o")),
        ("backward", "matmul", ("dW_o",)),
        ("backward", "matmul", ("dh_2",)),
        ("backward", "bias_activation_backward", ("delta_2", "db_2")),
        ("backward", "matmul", ("dW_2",)),
        ("backward", "matmul", ("dh_1",)),
        ("backward", "bias_activation_backward", ("delta_1", "db_1")),
        ("backward", "matmul", ("dW_1",)),
        ("update", "clip", ("scalars",)),
        ("update", "advance", ("counters", "scalars")),
        ("update", "update", ("parameters", "states")),
    ]


@pytest.mark.parametrize("depth", [0, 1, 2, 4])
def test_each_gradient_needs_the_one_above_it(depth: int) -> None:
    step = gb.MLP([4, *[5] * depth, 3], "gelu", device="reference").step(7)
    needs = {b.name: set(step.needs(o)) for o in step.operations for b in o.written if o.phase == "backward"}
    forward = {o.out.name: set(step.needs(o)) for o in step.operations if o.name == "matmul" and o.phase == "forward"}
    forward["do"] = next(set(step.needs(o)) for o in step.operations if o.name == "bias_loss")
    names = [*map(str, range(1, depth + 1)), "o"]
    below = dict(zip(names, ["X", *(f"h_{name}" for name in names)], strict=False))
    for name in names:
        top = "do" if name == "o" else f"delta_{name}"
        known = {below[name]} - {"X"}
        assert needs[f"dW_{name}"] == {top} | known  # dW_l <= delta_l (and h_{l-1}, which is there)
        assert forward["o" if name == "o" else f"z_{name}"] == known
    for lower, upper in pairwise(names):
        assert needs[f"dh_{lower}"] == {"do" if upper == "o" else f"delta_{upper}"}  # dh_l <= delta_{l+1}
        assert needs[f"delta_{lower}"] == {f"dh_{lower}", f"z_{lower}"}  # delta_l <= dh_l; gelu' needs z_l
        assert needs[f"db_{lower}"] == needs[f"delta_{lower}"]  # one pass
    assert forward["do"] == {"o"}


@pytest.mark.parametrize("sizes", [[4, 3], [1, 1, 2], [5, 7, 11, 3], [13, 2, 2, 17, 2]])
@pytest.mark.parametrize("n", [1, 9])
def test_flops_of_the_products(sizes: list[int], n: int) -> None:
    step = gb.MLP(sizes, device="reference").step(n)
    products = [o for o in step.operations if o.name == "matmul"]
    expected = 6 * n * sum(a * b for a, b in pairwise(sizes)) - 2 * n * sizes[0] * sizes[1]  # nobody needs dh_0
    assert sum(o.flops for o in products) == expected
    assert step.flops == sum(o.flops for o in step.operations) > expected
    assert step.bytes == sum(o.nbytes for o in step.operations)


def test_bytes_count_every_array_of_an_operation_once() -> None:
    step = gb.MLP([4, 5, 3], "gelu", device="reference", dtype="float64").step(7)
    first, second, *_ = step.operations
    assert first.nbytes == 8 * (7 * 4 + 4 * 5 + 7 * 5)
    assert second.nbytes == 8 * (7 * 5 + 5 + 2 * 7 * 5)  # z is read and written, b read, h written


def test_a_step_is_printed_line_by_line() -> None:
    text = str(gb.MLP([4, 5, 3], "tanh", device="reference").step(7, gb.SGD(0.1)))
    for line in (
        "z_1 = X W_1",
        "z_1 += b_1;  h_1 = tanh(z_1)",
        "dW_o = h_1ᵀ do",
        "dh_1 = do W_oᵀ",
        "dW_1 = Xᵀ δ_1",
        "θ ← SGD(θ, ∇)",
    ):
        assert line in text
    assert "δ_1 = dh_1 ⊙ tanh′(z_1);  db_1 = Σ_rows δ_1" in text
    assert text.endswith(f"in {8 + 2} operations")


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.1, "clip_value": 0.05}], ids=["plain", "clipped"])
def test_eager_and_compiled_give_the_same_bits(options: dict[str, Any], device: str, rng: np.random.Generator) -> None:
    results = []
    for compiled in (False, True):
        model = gb.MLP([5, 17, 3], "silu", device=device, dropout=0.2)
        step = model.step(6, gb.AdamW(gb.Cosine(0.1, steps=5), **options))
        feed(model, step, np.random.default_rng(1), 6)
        run = step.compile() if compiled else None
        for _ in range(3):
            if run is not None:
                run()
                continue
            step.run_eagerly()
        state = model.optimizer_state
        arrays = (
            model.parameters.flat,
            model.gradients.flat,
            state.states,
            state.scalars,
            state.counters,
            step.names.array("loss"),
        )
        results.append([model.backend.to_numpy(a).copy() for a in arrays])
    for eager, compiled_bits in zip(*results, strict=True):
        assert np.array_equal(eager, compiled_bits)


def test_three_steps_in_one_call_are_three_calls(device: str) -> None:
    results = []
    for calls in ([3], [1, 1, 1]):
        model = gb.MLP([5, 7, 3], device=device)
        step = model.step(6, gb.Adam(0.1))
        feed(model, step, np.random.default_rng(1), 6)
        run = step.compile()
        for times in calls:
            run(times)
        results.append(model.backend.to_numpy(model.parameters.flat).copy())
    assert np.array_equal(*results)


def test_compiling_runs_nothing(device: str) -> None:
    model = gb.MLP([5, 7, 3], device=device)
    before = model.backend.to_numpy(model.parameters.flat).copy()
    model.step(6, gb.Adam(0.1)).compile()
    assert np.array_equal(model.backend.to_numpy(model.parameters.flat), before)
    assert int(model.optimizer_state.counters[0]) == 0


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_warm_step_allocates_no_array(activation: str, dropout: float, rng: np.random.Generator) -> None:
    model = gb.MLP([256, 257, 129, 10], activation, device="cpu", dropout=dropout)
    step = model.step(128, gb.Adam(1e-3, clip_norm=1.0))
    feed(model, step, rng, 128)
    run = step.compile()
    run(2)
    peaks, left = [], []
    tracemalloc.start()  # NumPy reports its arrays there
    try:
        for _ in range(5):  # other threads of this process allocate at times
            run()
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            run(3)
            after, peak = tracemalloc.get_traced_memory()
            peaks.append(peak - before)
            left.append(after - before)
        assert len(np.ones(4096)) == 4096  # the meter sees an array of 32 KB
        _, with_array = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # the smallest array with a row for each sample has 5 KB; calls leave only numbers and tuples
    assert min(peaks) < 4096
    assert min(left) < 1024
    assert with_array - after > 32_000


def test_a_step_shares_memory_where_the_mathematics_allows() -> None:
    model = gb.MLP([4, 5, 3], ["softplus"], device="reference")
    array = model.step(7).names.array
    assert array("z_1").ctypes.data == array("h_1").ctypes.data  # softplus' needs h alone
    assert array("dh_1").ctypes.data == array("delta_1").ctypes.data
    kept = model.step(7, keep=True).names.array
    assert len({kept(name).ctypes.data for name in ("z_1", "h_1", "dh_1", "delta_1", "o", "do")}) == 6
    gelu = gb.MLP([4, 5, 3], ["gelu"], device="reference").step(7).names.array
    assert gelu("z_1").ctypes.data != gelu("h_1").ctypes.data


def test_targets_and_weights_have_their_places() -> None:
    model = gb.MLP([4, 3], device="reference")
    assert model.step(7).names.array("y").dtype == np.int64
    assert model.step(7, class_indices=False).names.array("y").shape == (7, 3)
    assert model.step(7, weighted=True).names.array("w").shape == (7,)
    with pytest.raises(ValueError, match="batch_size is 0"):
        model.step(0)
