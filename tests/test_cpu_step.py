"""The compiled CPU step: the bits of its operations run one at a time, and BLAS chosen by measurement."""

import json

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.kernels.cpu_blas import Chooser, compile_blas, libraries
from gpubackprop.network import Data


def make(rng, optimizer, **options):
    model = gb.MLP([12, 9, 7, 3], **options)
    backend = model.backend
    data = Data(rng.normal(size=(60, 12)).astype(model.dtype), rng.integers(0, 3, 60), None, rng.permutation(60))
    return model, model.step(10, optimizer, data=data).compile(), backend


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (gb.SGD(0.1), {"activation": "tanh"}),
        (
            gb.Adam(gb.OneCycle(1e-2, steps=6), clip_norm=0.1, clip_value=0.05),
            {"activation": ["gelu", "relu"], "dropout": 0.3},
        ),
        (gb.RMSprop(1e-2, momentum=0.9, centered=True), {"dtype": "float64"}),
    ],
)
def test_a_composed_step_has_the_bits_of_its_operations(optimizer, options):
    (one, loop, _), (two, composed, _) = (make(np.random.default_rng(0), optimizer, **options) for _ in range(2))
    composed.compose()
    np.testing.assert_array_equal(two.parameters.flat, one.parameters.flat)  # composing runs nothing
    loop._loop(5)
    composed(2)
    composed(3)
    np.testing.assert_array_equal(two.parameters.flat, one.parameters.flat)
    assert two.optimizer_state.counters.tolist() == [5, 50]


def test_a_step_is_composed_when_the_loop_has_run_for_as_long_as_compiling_takes():
    model, run, _ = make(np.random.default_rng(0), gb.SGD(0.1), activation="softsign")
    run._spent = 0.0  # as on a machine where it was never compiled
    run(1)
    assert 0 < run._spent < run.PATIENCE
    run._spent = run.PATIENCE
    run(1)
    assert run._composed.function.signatures
    assert model.optimizer_state.counters[0] == 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("library", libraries(), ids=lambda library: library.name)
def test_every_library_multiplies_every_order_of_memory(library, dtype):
    rng = np.random.default_rng(0)
    for m, n, k in ((1, 1, 1), (5, 3, 7), (33, 17, 20)):
        a, b = rng.integers(-3, 4, (m, k)).astype(dtype), rng.integers(-3, 4, (k, n)).astype(dtype)
        for at in (False, True):
            for bt in (False, True):
                out = np.full((m, n), np.nan, dtype)
                x, y = (np.asfortranarray(a) if at else a), (np.asfortranarray(b) if bt else b)
                compile_blas(library, np.dtype(dtype), at, bt)(x, y, out)
                np.testing.assert_array_equal(out, a @ b)  # whole numbers: exact in any order


def test_the_choice_of_a_library_is_kept_on_disk_and_a_broken_file_only_costs_a_measurement(tmp_path, monkeypatch):
    monkeypatch.setenv("GPUBACKPROP_CACHE_DIR", str(tmp_path))
    a, b, out = np.ones((4, 6), np.float32), np.ones((6, 5), np.float32), np.empty((4, 5), np.float32)
    first = Chooser()
    first.kernel(a, b, out)
    (file,) = tmp_path.glob("cpu-products-*.json")
    assert json.loads(file.read_text()) == first.chosen
    assert Chooser().chosen == first.chosen
    file.write_text('{"4x5x6 float32 00": "a library that is gone"}')
    assert Chooser().chosen == {}
    file.write_text("{")
    Chooser().kernel(a, b, out)
    assert json.loads(file.read_text())
