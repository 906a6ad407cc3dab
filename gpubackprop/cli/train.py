"""``gpubackprop train``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpubackprop.cli.options import Activation, Device, Layers, LossName, Seed, make_optimizer, parse_layers

if TYPE_CHECKING:
    from gpubackprop.datasets import DataSet
    from gpubackprop.losses import Loss
    from gpubackprop.mlp import MLP
    from gpubackprop.optimizers import Optimizer
    from gpubackprop.training.history import History


def train(
    data: Annotated[str, typer.Option(help="'digits', or an .npz, .csv or IDX file, gzipped or not.")] = "digits",
    target: Annotated[
        str | None, typer.Option(help="Of a .csv file: the target column, by name or number; the last by default.")
    ] = None,
    header: Annotated[
        bool | None, typer.Option(help="Whether the first row of a .csv file is a header; found out by default.")
    ] = None,
    layers: Layers = None,
    activation: Activation = "relu",
    loss: LossName = "softmax_cross_entropy",
    optimizer: Annotated[str, typer.Option(help="sgd, adam, adamw, rmsprop, adagrad, lion or lbfgs.")] = "adam",
    learning_rate: Annotated[float | None, typer.Option(help="The optimizer's own by default.")] = None,
    schedule: Annotated[
        str, typer.Option(help="constant, step, exponential, cosine, linear_warmup, one_cycle.")
    ] = "constant",
    weight_decay: Annotated[float | None, typer.Option(help="The optimizer's own by default.")] = None,
    dropout: Annotated[float, typer.Option(help="Share of hidden units dropped in training.")] = 0.0,
    epochs: Annotated[int, typer.Option(help="Passes over the training set.")] = 30,
    batch_size: Annotated[int, typer.Option(help="Samples in a mini-batch.")] = 32,
    patience: Annotated[int | None, typer.Option(help="Stop after so many epochs without a better test loss.")] = None,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the model, the history and the learning curve.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the training in --out.")] = False,
    quiet: Annotated[bool, typer.Option(help="Show no progress.")] = False,
) -> None:
    """Train a multilayer perceptron and measure it on a test set."""
    from gpubackprop.backends import get_backend
    from gpubackprop.datasets import load_dataset
    from gpubackprop.definitions import check_count
    from gpubackprop.losses import LOSSES
    from gpubackprop.mlp import MLP
    from gpubackprop.training.callbacks import EarlyStopping
    from gpubackprop.training.history import History

    check_count("epochs", epochs)
    check_count("batch_size", batch_size)
    definition = LOSSES.resolve(loss)
    backend = get_backend(device)
    if out is not None:
        _check_folder(out)
    d = load_dataset(data, classification=definition.kind.numbered, seed=seed, target=target, header=header)
    print(f"{d.name}: {d.found}")
    sizes = _sizes(layers, d, definition)
    history = History()
    if resume:
        model, history = _resume(out, backend.device)
        if tuple(sizes) != model.layer_sizes:
            raise ValueError(
                f"the network in {str(out)!r} has layers {'-'.join(map(str, model.layer_sizes))}; give the same --layers"
            )
    else:
        per_layer = activation.split(",") if "," in activation else activation
        model = MLP(sizes, per_layer, definition, backend, dtype, seed, dropout=dropout)
    _check_data(data, d, model)
    print(f"{d.name}: {len(d.X):,} training and {len(d.X_test):,} test samples, {d.X.shape[1]} features")
    print(f"{model}, {model.parameters.count:,} parameters")
    if resume and model.optimizer_state is not None:
        chosen: str | Optimizer = model.optimizer_state.optimizer
    else:
        steps = epochs * -(-len(d.X) // batch_size)
        chosen = make_optimizer(optimizer, learning_rate, schedule, weight_decay, steps)
    callbacks: list[Any] = [EarlyStopping(patience=patience)] if patience is not None else []
    if out is not None:
        callbacks.append(_Keep(out, history))
    remaining = epochs - len(history.get("loss", []))
    if remaining < 1:
        raise ValueError(
            f"the training in {str(out)!r} has {epochs - remaining} epochs already; ask for more with --epochs"
        )
    new = model.fit(
        d.X, d.y, epochs=remaining, batch_size=batch_size, optimizer=chosen, validation_data=(d.X_test, d.y_test),
        callbacks=callbacks, progress=not quiet,
    )  # fmt: skip
    history = _joined(history, new)
    _print_results(model, history, new, model.evaluate(d.X_test, d.y_test))
    if out is not None and history.get("loss"):
        _write(out, model, history, d.name)
        print(f"wrote {out / 'model.safetensors'}, history.json and {out / 'learning_curve.png'}")


def _sizes(layers: str | None, d: DataSet, loss: Loss) -> list[int]:
    """Return the layer sizes asked for, which must fit the data, or two hidden layers."""
    kind, y, y_test = loss.kind, d.y, d.y_test
    n_outputs = int(max(y.max(), y_test.max())) + 1 if kind.takes_indices else 1 if y.ndim == 1 else y.shape[1]
    sizes = parse_layers(layers) if layers is not None else [d.X.shape[1], 64, 32, n_outputs]
    if sizes[0] != d.X.shape[1] or sizes[-1] < n_outputs or (not kind.takes_indices and sizes[-1] != n_outputs):
        counted = "classes" if kind.takes_indices else "targets"
        raise ValueError(
            f"--layers is {'-'.join(map(str, sizes))}; {d.name} has {d.X.shape[1]} features and {n_outputs} {counted}: "
            f"begin with {d.X.shape[1]} and end with {n_outputs}"
        )
    return sizes


def _check_data(data: str, d: DataSet, model: MLP) -> None:
    """Check that a model takes the samples and targets of both sets."""
    from gpubackprop.intake import Samples

    try:
        for X_part, y_part in ((d.X, d.y), (d.X_test, d.y_test)):
            Samples.given(X_part, y_part).on(model.backend, model.architecture)
    except ValueError as error:
        raise ValueError(f"{data!r}: {error}") from None


def _print_results(model: MLP, history: History, new: History, result: dict[str, float]) -> None:
    if new.interrupted:
        print(f"interrupted after {len(history.get('loss', []))} epochs; what was learned is kept")
    seconds = sum(new.get("seconds", []))
    print(
        f"trained {len(new.get('loss', []))} epochs in {seconds:.2f} s on {model.device}, "
        f"after {new.compile_seconds:.2f} s of compiling"
    )
    if history.get("val_loss"):
        from gpubackprop.inspect.pictures import sparkline

        print(f"test loss   {sparkline(history['val_loss'])}  {result['loss']:.4f}")
    for name, value in result.items():
        if name != "loss":
            print(f"test {name}: {value:.4f}")


class _Keep:
    """Writes the state of the training into a folder, so that it can be resumed: at most every few seconds, and at the end."""

    EVERY = 5.0

    def __init__(self, out: Path, before: Any) -> None:
        self.out, self.before, self.next = out, before, 0.0

    def on_epoch_end(self, training: Any) -> None:
        import time

        if time.monotonic() >= self.next:
            self._write(training)
            self.next = time.monotonic() + self.EVERY

    def on_train_end(self, training: Any) -> None:
        self._write(training)

    def _write(self, training: Any) -> None:
        from gpubackprop.training.checkpoint import save

        save(training.model, self.out / "checkpoint.safetensors", _joined(self.before, training.history))


def _resume(out: Path | None, device: str) -> tuple[MLP, Any]:
    from gpubackprop.mlp import MLP
    from gpubackprop.training.checkpoint import load_training

    if out is None:
        raise ValueError("--resume goes on with the training in a folder; name it with --out")
    network, history = load_training(out / "checkpoint.safetensors", device)
    return MLP.of(network), history


def _joined(before: Any, after: Any) -> Any:
    from gpubackprop.training.history import History

    return History({name: [*before.get(name, []), *after.get(name, [])] for name in {**before, **after}})


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out is {str(out)!r}, which is a file; name a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # better now than after the training
            pass
    except OSError as error:
        raise ValueError(f"--out is {str(out)!r}, which cannot be written to: {error.strerror}") from None


def _write(out: Path, model: MLP, history: dict[str, list[float]], name: str) -> None:
    from gpubackprop.inspect.pictures import learning_curve
    from gpubackprop.machine.files import write_whole

    model.save(out / "model.safetensors")
    write_whole(out / "history.json", json.dumps(history, indent=1).encode())
    learning_curve(history, out / "learning_curve.png", f"{name}: {model}")
