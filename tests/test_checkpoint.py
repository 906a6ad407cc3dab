"""Networks on disk: what is saved comes back; a file that is damaged is an error of one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gpubackprop as gb
from gpubackprop.activations import ACTIVATIONS, activation
from gpubackprop.inspect.explain import random_batch
from gpubackprop.losses import LOSSES
from gpubackprop.training.checkpoint import load_training, save
from gpubackprop.training.model_file import FORMAT


@pytest.fixture
def saved(tmp_path: Path) -> tuple[gb.MLP, Path]:
    """A network, and the file that holds it."""
    model = gb.MLP([4, 5, 3], "tanh", seed=3)
    path = tmp_path / "net.safetensors"
    model.save(path)
    return model, path


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_network_comes_back(dtype: str, device: str, tmp_path: Path, rng: np.random.Generator) -> None:
    leaky, loss = ACTIVATIONS["leaky_relu"](negative_slope=0.3), LOSSES["huber"](delta=2.0, reduction="sum")
    model = gb.MLP([4, 5, 6, 2], [leaky, "gelu"], loss, device, dtype, seed=2**63, dropout=0.25)
    model.save(tmp_path / "deep" / "net.safetensors")
    back = gb.load(tmp_path / "deep" / "net.safetensors", device=device)
    assert back.layer_sizes == model.layer_sizes
    assert back.activations == model.activations
    assert (back.loss, back.dtype, back.seed, back.dropout) == (loss, model.dtype, 2**63, 0.25)
    assert np.array_equal(back.backend.to_numpy(back.parameters.flat), model.backend.to_numpy(model.parameters.flat))
    X = rng.normal(size=(3, 4))
    assert np.array_equal(back.forward(X), model.forward(X))


@pytest.mark.parametrize("optimizer", [gb.AdamW(gb.Cosine(0.05, steps=12), clip_norm=1.0), gb.SGD(0.1), gb.RMSprop(centered=True)],
                         ids=lambda o: type(o).__name__)  # fmt: skip
def test_training_goes_on_from_a_file_with_the_same_bits(
    optimizer: Any, tmp_path: Path, rng: np.random.Generator
) -> None:
    whole, half = (gb.MLP([4, 6, 3], dropout=0.2) for _ in range(2))
    X, y = random_batch(whole, 22, rng)
    whole.fit(X, y, epochs=4, batch_size=8, optimizer=optimizer, progress=False)
    history = half.fit(X, y, epochs=2, batch_size=8, optimizer=optimizer, progress=False)
    save(half, tmp_path / "half", history)
    network, past = load_training(tmp_path / "half")
    back = gb.MLP.of(network)
    assert dict(past) == dict(history)
    assert back.optimizer_state.optimizer == optimizer
    back.fit(X, y, epochs=2, batch_size=8, optimizer=optimizer, progress=False)
    assert np.array_equal(back.parameters.flat, whole.parameters.flat)


def test_the_file_has_torchs_names(saved: tuple[gb.MLP, Path]) -> None:
    model, path = saved
    tensors = load_file(path)
    assert sorted(tensors) == ["layers.0.bias", "layers.0.weight", "layers.1.bias", "layers.1.weight"]
    assert np.array_equal(tensors["layers.0.weight"], model.parameters.W[0].T)


def test_saving_replaces_a_file_and_leaves_nothing_else(saved: tuple[gb.MLP, Path]) -> None:
    model, path = saved
    model.parameters.flat[...] = 0
    model.save(str(path))
    assert not gb.load(str(path)).parameters.flat.any()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_failed_write_leaves_the_old_file(saved: tuple[gb.MLP, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = saved
    before = path.read_bytes()

    def full(self: Path, target: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        model.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_file_is_an_error(share: float, saved: tuple[gb.MLP, Path]) -> None:
    _, path = saved
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="is not a complete safetensors file") as caught:
        gb.load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing\.safetensors"):
        gb.load(tmp_path / "nothing.safetensors")


def test_a_file_of_another_kind_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_text("epoch,loss\n1,0.5\n")
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        gb.load(path)
    save_file({"w": np.zeros(3)}, path)
    with pytest.raises(ValueError, match=f"holds format None; this version reads '{FORMAT}'"):
        gb.load(path)
    save_file({"w": np.zeros(3)}, path, metadata={"format": "gpubackprop-mlp-99"})
    with pytest.raises(ValueError, match="holds format 'gpubackprop-mlp-99'"):
        gb.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, t: d.pop("loss"), "net.safetensors': the description has no loss"),
        (lambda d, t: d.update(activation=3), "activation in the description is 3, which has the wrong type"),
        (lambda d, t: d.update(layer_sizes=None), "layer_sizes in the description is None, which has the wrong type"),
        (lambda d, t: d.update(target_shape="ab"), "target_shape in the description is 'ab', which has the wrong type"),
        (lambda d, t: d.update(activation=[{"name": "rleu", "parameters": {}}]), "unknown activation 'rleu'"),
        (lambda d, t: d.update(layer_sizes=[4, 6, 3]), r"layers\.0\.(bias|weight) has shape"),
        (lambda d, t: d.update(depth=3), "the description has 'depth', which is unknown"),
        (lambda d, t: t.pop("layers.1.bias"), "missing .*layers.1.bias"),
        (lambda d, t: t["layers.1.bias"].fill(np.nan), "layers.1.bias holds NaN or infinity"),
    ],
    ids=[
        "no loss",
        "activation",
        "sizes",
        "target shape",
        "unknown activation",
        "other sizes",
        "unknown name",
        "missing array",
        "NaN",
    ],
)
def test_a_damaged_description_is_an_error(change: Any, message: str, saved: tuple[gb.MLP, Path]) -> None:
    from safetensors import safe_open

    _, path = saved
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    del metadata["sha256"]  # a file of an earlier version
    tensors = {name: a.copy() for name, a in load_file(path).items()}
    description = json.loads(metadata["mlp"])
    change(description, tensors)
    save_file(tensors, path, metadata | {"mlp": json.dumps(description)})
    with pytest.raises(ValueError, match=message) as caught:
        gb.load(path)
    assert "\n" not in str(caught.value)


def test_a_description_that_is_no_json_is_an_error(saved: tuple[gb.MLP, Path]) -> None:
    _, path = saved
    for text in ("{", "[" * 200_000, "3"):
        save_file(load_file(path), path, {"format": FORMAT, "mlp": text})
        with pytest.raises(ValueError, match=r"has a damaged description|the description is 3"):
            gb.load(path)


def test_an_activation_of_ones_own_must_be_registered_before_loading(tmp_path: Path) -> None:
    @activation(needs="h")
    def for_a_checkpoint(real: Any, m: Any) -> Any:
        one = real(1)
        return (lambda z: z), (lambda z, h: one)

    gb.MLP([4, 5, 3], "for_a_checkpoint", device="reference").save(tmp_path / "net")
    assert gb.load(tmp_path / "net", "reference").activations == (for_a_checkpoint,)
    del ACTIVATIONS["for_a_checkpoint"]
    with pytest.raises(ValueError, match="unknown activation 'for_a_checkpoint'"):
        gb.load(tmp_path / "net", "reference")


def test_the_same_network_has_the_same_bytes(tmp_path: Path, rng: np.random.Generator) -> None:
    model = gb.MLP([4, 5, 3], "tanh", seed=3)
    history = model.fit(rng.normal(size=(20, 4)), np.arange(20) % 3, epochs=2, optimizer="adam", progress=False)
    contents = set()
    for number in range(8):  # the library's order is one of 24, chosen anew each time
        path = tmp_path / f"{number}.safetensors"
        save(model, path, dict(history))
        contents.add(path.read_bytes())
    assert len(contents) == 1
    assert dict(load_training(path)[1]) == dict(history)
