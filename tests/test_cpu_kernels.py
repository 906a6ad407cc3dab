"""Compiled kernels on disk: found again, never mixed up, and a folder that cannot be used only costs the compile time."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.activations import ACTIVATIONS, Activation
from gpubackprop.code_digest import fingerprint
from gpubackprop.kernels.cpu import loss as cpu_loss
from gpubackprop.kernels.cpu import passes as cpu
from gpubackprop.kernels.cpu import training as cpu_training
from gpubackprop.losses import LOSSES
from gpubackprop.machine import cache
from gpubackprop.optimizers import OPTIMIZERS

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


def digest(kernel: Any) -> str:
    """Return what a kernel is filed under."""
    return str(kernel.digest)


def test_no_two_variants_of_a_kernel_share_an_entry() -> None:
    booleans = (False, True)
    kernels = {}
    for dtype, in_place in product((F32, F64), booleans):
        for name in ("relu", "tanh", "gelu"):
            entry = ACTIVATIONS[name]
            kernels["forward", name, dtype, in_place] = cpu.compile_bias_activation_forward(entry, dtype, in_place)
            kernels["backward", name, dtype, in_place] = cpu.compile_bias_activation_backward(entry, dtype, in_place)
        for name, weighted in product(("huber", "poisson"), booleans):
            kernels["loss", name, dtype, weighted, in_place] = cpu_loss.compile_bias_loss(
                LOSSES[name], dtype, False, weighted, in_place, False
            )
        for indices, weighted, short in product(booleans, booleans, booleans):
            loss = LOSSES["softmax_cross_entropy"]
            kernels["softmax", dtype, indices, weighted, in_place, short] = cpu_loss.compile_bias_loss(
                loss, dtype, indices, weighted, in_place, short
            )
    for optimizer in (
        gb.SGD(),
        gb.SGD(momentum=0.5),
        gb.Adam(),
        gb.AdamW(),
        gb.Adam(clip_value=1.0),
    ):
        kernels["update", optimizer] = cpu_training.compile_update(optimizer, F32)
    digests = [digest(kernel) for kernel in kernels.values()]
    assert len(set(digests)) == len(kernels)


def test_parameters_of_a_definition_are_part_of_the_entry() -> None:
    leaky = ACTIVATIONS["leaky_relu"]
    kernels = [cpu.compile_bias_activation_backward(leaky(negative_slope=s), F32, True) for s in (0.1, 0.2)]
    assert digest(kernels[0]) != digest(kernels[1])


def test_fingerprints_tell_all_definitions_apart() -> None:
    entries = [*ACTIVATIONS.values(), *LOSSES.values()]
    assert len({entry.fingerprint for entry in entries}) == len(entries)
    steps = [kind() for kind in OPTIMIZERS.values() if kind is not gb.LBFGS]
    assert len({optimizer.fingerprint for optimizer in steps}) == len(steps)


FINGERPRINTS = """
from gpubackprop.activations import ACTIVATIONS
from gpubackprop.code_digest import fingerprint
from gpubackprop.losses import LOSSES
import gpubackprop as gb
def choose(x):
    return x in {"alpha", "beta", "gamma", "delta"}
print([d.fingerprint for d in (*ACTIVATIONS.values(), *LOSSES.values(), gb.Adam(gb.Cosine(0.1)))])
print(fingerprint(choose, {"alpha", "beta", "gamma"}, frozenset(["x", "y", "z"]), {"b": 1, "a": 2}))
"""


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    outputs = set()
    for seed in ("1", "2", "3"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", FINGERPRINTS], env=environment, capture_output=True, text=True, check=True
        )
        outputs.add(done.stdout)
    assert len(outputs) == 1


def helper_one(x: float) -> float:
    """Return one more."""
    return x + 1.0


def helper_two(x: float) -> float:
    """Return two more."""
    return x + 2.0


def test_every_edit_changes_the_fingerprint() -> None:
    def closure(factor: float, helper: Any) -> Any:
        return lambda x: helper(x) * factor

    def default(x: float, y: float = 1.0) -> float:
        return x + y

    def other_default(x: float, y: float = 2.0) -> float:
        return x + y

    versions = [
        closure(1.0, helper_one), closure(2.0, helper_one), closure(1.0, helper_two), default, other_default,
        lambda x: x * 2.0, lambda x: x * 3.0, lambda x: x + 2.0, lambda x: helper_one(x), lambda x: helper_two(x),
    ]  # fmt: skip
    assert len({fingerprint(version) for version in versions}) == len(versions)
    assert fingerprint(closure(1.0, helper_one)) == fingerprint(closure(1.0, helper_one))


# ---------------------------------------------------------------------- the folder


def fresh() -> Activation:
    """Return a definition that no kernel in this process was compiled from, but that looks the same on disk each time."""

    def define(real: Any, m: Any) -> Any:
        three = real(3)
        return (lambda z: three * z), (lambda z, h: three)

    return Activation("three_times", define, needs="h")


def use(entry: Activation) -> Any:
    """Compile and use its kernel; return the kernel, which this process has not met, whatever it has in memory."""
    z, b = np.ones((2, 3), np.float32), np.ones(3, np.float32)
    kernel = cpu.compile_bias_activation_forward.__wrapped__(entry, F32, True)  # type: ignore[attr-defined]
    kernel(z, b, z)
    assert (z == 6).all()
    return kernel


def found(kernel: Any) -> bool:
    """Return whether a kernel came from disk."""
    assert len(kernel.entries) == 1
    return bool(kernel.from_disk == 1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for kernels."""
    path = tmp_path / "kernels"
    monkeypatch.setenv("GPUBACKPROP_CACHE_DIR", str(path))
    return path


def test_a_kernel_is_found_again(folder: Path) -> None:
    assert not found(use(fresh()))
    assert [p.suffix for p in (folder / "cpu").iterdir()] == [".nbc"]
    assert found(use(fresh()))


def test_a_damaged_entry_is_compiled_again(folder: Path) -> None:
    use(fresh())
    (path,) = (folder / "cpu").iterdir()
    whole = path.read_bytes()
    flipped = [
        bytes([*whole[:at], whole[at] ^ 1, *whole[at + 1 :]]) for at in (0, 30, 60, len(whole) // 2, len(whole) - 1)
    ]
    for content in (b"", b"garbage", whole[:-1], whole[:20], whole + b"0", *flipped):
        path.write_bytes(content)
        assert cache.read(f"cpu/{path.name}") is None
    assert not found(use(fresh()))
    assert path.read_bytes().startswith(whole[:26])
    assert found(use(fresh()))


def test_a_folder_that_disappears_only_costs_the_compile_time(folder: Path) -> None:
    import shutil

    use(fresh())
    shutil.rmtree(folder)
    assert not found(use(fresh()))
    assert found(use(fresh()))


def test_a_folder_that_cannot_be_made_only_costs_the_compile_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("GPUBACKPROP_CACHE_DIR", str(tmp_path / "file" / "kernels"))
    for _ in range(2):
        assert not found(use(fresh()))
    cache.write("entry", b"content")
    assert cache.read("entry") is None
