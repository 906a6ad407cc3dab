"""``gpubackprop train``: a training on a file, which can be interrupted anywhere and resumed."""

from __future__ import annotations

import math
import shlex
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpubackprop.activations import ACTIVATIONS
from gpubackprop.cli import options
from gpubackprop.cli.options import Activation, Device, Layers, OptimizerName, ScheduleName, Seed
from gpubackprop.labels import labels_of
from gpubackprop.losses import LOSSES
from gpubackprop.optimizers import OPTIMIZERS
from gpubackprop.schedules import SCHEDULES

if TYPE_CHECKING:
    from gpubackprop.datasets import DataSet
    from gpubackprop.losses import Loss
    from gpubackprop.mlp import MLP
    from gpubackprop.resume import Resumed
    from gpubackprop.training.history import History

CLASSIFICATION, REGRESSION = "softmax_cross_entropy", "mean_squared_error"
"""The losses of targets that are recognised."""
CONTROLS = ("out", "resume", "previous", "overwrite", "checkpoint_every", "quiet")
"""Options of one call; all others are settings that the run keeps."""


def train(
    ctx: typer.Context,
    data: Annotated[
        str | None,
        typer.Argument(help="'digits', or an .npz, .csv or IDX file, gzipped or not.", show_default="digits"),
    ] = None,
    data_option: Annotated[str | None, typer.Option("--data", help="The same as DATA.")] = None,
    test: Annotated[
        str | None, typer.Option(metavar="FILE", help="The test set; a fifth of DATA by default, if it has none.")
    ] = None,
    validation: Annotated[
        float, typer.Option(metavar="FRACTION", help="Share of the training data for the validation set; 0: none.")
    ] = 0.1,
    split_seed: Annotated[int, typer.Option(help="Seed of the split into training, validation and test set.")] = 0,
    target: Annotated[
        str | None, typer.Option(help="For a .csv file: the target column, by name or number; the last by default.")
    ] = None,
    header: Annotated[
        bool | None, typer.Option(help="Whether the first row of a .csv file is a header; detected by default.")
    ] = None,
    delimiter: Annotated[str | None, typer.Option(help="For a .csv file: , ; | or tab; detected by default.")] = None,
    drop: Annotated[
        str | None, typer.Option(metavar="COLUMNS", help="For a .csv file: columns to leave out, as in id,name.")
    ] = None,
    standardize: Annotated[
        bool | None, typer.Option(help="Give each feature mean 0 and deviation 1; the default for a .csv file.")
    ] = None,
    missing: Annotated[
        str | None, typer.Option(help="median: fill in missing cells of a .csv file; an error by default.")
    ] = None,
    layers: Layers = None,
    activation: Activation = "relu",
    loss: Annotated[str | None, options.named(LOSSES, "; recognised from the target by default.")] = None,
    optimizer: OptimizerName = "adam",
    learning_rate: Annotated[float | None, typer.Option(help="The optimizer's own by default.")] = None,
    schedule: ScheduleName = "constant",
    weight_decay: Annotated[float | None, typer.Option(help="The optimizer's own by default.")] = None,
    dropout: Annotated[float, typer.Option(help="Fraction of hidden units dropped in training.")] = 0.0,
    epochs: Annotated[int, typer.Option(help="Passes over the training set.")] = 30,
    batch_size: Annotated[int, typer.Option(help="Samples in a mini-batch.")] = 32,
    patience: Annotated[
        int | None, typer.Option(help="Stop after this many epochs without a better validation loss.")
    ] = None,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for checkpoint, model, history and learning curve.")] = None,
    resume: Annotated[
        str | None, typer.Option(help="Resume the run in this folder, or in --out; it keeps its settings.")
    ] = None,
    previous: Annotated[bool, typer.Option(help="With --resume: use the checkpoint before the last.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the run in --out.")] = False,
    checkpoint_every: Annotated[str, typer.Option(help="30s, 5min, 2h, '500 steps' or '2 epochs'.")] = "30s",
    quiet: Annotated[bool, typer.Option(help="Show no progress.")] = False,
) -> None:
    """Train a multilayer perceptron and measure it on a test set."""
    from gpubackprop.datasets import load_dataset
    from gpubackprop.training.callbacks import EarlyStopping
    from gpubackprop.training.divergence import DivergenceWarning
    from gpubackprop.training.run import Run

    settings = {name: value for name, value in ctx.params.items() if name not in CONTROLS}
    settings["data"] = _source(data, settings.pop("data_option"))
    run = None
    if resume is not None:
        out = _folder(resume, out)
        run = _resumed(ctx, out, settings, previous=previous, every=checkpoint_every)
        settings = run.about | {"epochs": settings["epochs"]}
    o = SimpleNamespace(**settings)
    definition = None if o.loss is None else LOSSES.resolve(o.loss)
    if run is None:
        _check(o, out)
    d = load_dataset(
        o.data, classification=None if definition is None else definition.kind.numbered, test=o.test,
        validation_fraction=o.validation, seed=o.split_seed, target=o.target, header=o.header, delimiter=o.delimiter,
        drop=[column.strip() for column in o.drop.split(",")] if o.drop else [], frame=True, missing=o.missing is not None,
        scaled=False,
    )  # fmt: skip
    print(f"{d.name}: {d.found}")
    if definition is None:
        definition = LOSSES.resolve(CLASSIFICATION if d.classification else REGRESSION)
        if d.recognised:
            print(_recognised(d, o.target))
    model = _model(o, d, definition) if run is None else run.model
    y, y_validation, y_test = (
        y if d.classes is None else labels_of(y, d.classes) for y in (d.y, d.y_validation, d.y_test)
    )
    _check_data(o.data, model, (d.X, y), (d.X_validation, y_validation), (d.X_test, y_test))
    print(
        f"{d.name}: {len(d.X):,} training, {len(d.X_validation):,} validation and {len(d.X_test):,} test samples, "
        f"{d.X.shape[1]} features"
    )
    if model.features is not None:
        print(f"features: {model.features}")
    print(f"{model}, {model.parameters.count:,} parameters")
    seen = (d.X_validation, y_validation) if len(d.X_validation) else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DivergenceWarning)  # printed below, on one line
        if run is not None:
            done = len(run.history.get("loss", []))
            print(f"resuming after {done} of {o.epochs} epochs")
            history = run.fit(d.X, y, epochs=o.epochs, validation_data=seen, progress=not quiet)
        else:
            done, steps = 0, o.epochs * -(-len(d.X) // o.batch_size)
            about = _canonical(settings | {"loss": definition.name})
            history = model.fit(
                d.X, y, epochs=o.epochs, batch_size=o.batch_size,
                optimizer=options.make_optimizer(o.optimizer, o.learning_rate, o.schedule, o.weight_decay, steps),
                callbacks=[] if o.patience is None else [EarlyStopping(patience=o.patience)],
                validation_data=seen, progress=not quiet,
                checkpoint=None if out is None else Run(out, every=checkpoint_every, overwrite=overwrite, about=about),
            )  # fmt: skip
    _print_results(model, history, done, o.patience, model.evaluate(d.X_test, y_test))
    if out is not None:
        from gpubackprop.inspect.pictures import draw_training
        from gpubackprop.training.scores import outputs_of

        draw_training(out / "learning_curve.png", f"{d.name}: {model}", history, d, outputs_of(model, d.X_test))
        print(f"wrote {out / 'model.safetensors'}, history.json and {out / 'learning_curve.png'}")
    if history.interrupted:
        if out is not None:
            print(f"to continue: gpubackprop train --resume {out}")
        sys.exit(130)
    if out is not None:
        folder, source = shlex.quote(str(out)), shlex.quote(o.data)
        print(f"next: gpubackprop evaluate {folder} {source}, or gpubackprop predict {folder} NEW.csv")


def _check(o: SimpleNamespace, out: Path | None) -> None:
    """Check what can be checked before the data are read, and make data paths independent of the current folder."""
    from gpubackprop.backends import get_backend
    from gpubackprop.definitions import check_count
    from gpubackprop.machine.files import check_folder

    check_count("epochs", o.epochs)
    check_count("batch_size", o.batch_size)
    if o.patience is not None and o.validation == 0:
        raise ValueError(
            "--patience goes by the validation set, and --validation is 0: give a share above 0, such as 0.1"
        )
    get_backend(o.device)
    if out is not None:
        check_folder("--out", out)


def _source(data: str | None, data_option: str | None) -> str:
    """Return the data source, which may be given by place or as --data."""
    if data is not None and data_option is not None and data != data_option:
        raise ValueError(f"DATA is {data!r} and --data is {data_option!r}; give one of them")
    return data or data_option or "digits"


def _recognised(d: DataSet, target: str | None) -> str:
    """Return the line that says what was made of the target, and how to choose something else."""
    name = f"target {target!r}" if target else "the target"
    taken = f"a classification by {CLASSIFICATION}" if d.classification else f"a regression by {REGRESSION}"
    other = f" {REGRESSION} makes it a regression" if d.classification else f" {CLASSIFICATION} takes them as classes"
    return f"{name} {d.recognised}, so this is {taken}; --loss{other if d.ambiguous else ' chooses another'}"


def _folder(resume: str, out: Path | None) -> Path:
    """Return the folder of the run to resume."""
    if not resume and out is None:
        raise ValueError("--resume needs the folder of the run: --resume FOLDER")
    if resume and out is not None and Path(resume).resolve() != out.resolve():
        raise ValueError(f"--resume is {resume!r} and --out is {str(out)!r}; a run resumes in its own folder")
    return Path(resume) if resume else Path(out or "")


def _resumed(ctx: typer.Context, folder: Path, settings: dict[str, Any], *, previous: bool, every: str) -> Resumed:
    """Return the run in a folder; an option that contradicts its settings is an error, more epochs are taken."""
    from gpubackprop.resume import resume

    run = resume(folder, previous=previous, checkpoint_every=every)
    if not run.about:
        raise ValueError(
            f"the run in {str(folder)!r} was not started by 'gpubackprop train'; resume it in Python, with gpubackprop.resume"
        )
    if settings.keys() != run.about.keys():
        raise ValueError(
            f"the run in {str(folder)!r} was started by another version, which had other options: train anew"
        )
    named = {name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", "DEFAULT") != "DEFAULT"}
    given = {"data" if name == "data_option" else name for name in named}
    if "epochs" not in given:
        settings["epochs"] = run.settings["epochs"]
    elif settings["epochs"] > run.settings["epochs"]:
        end = "" if run.about["schedule"] == "constant" else "; after the end of the schedule its last rate stays"
        print(f"--epochs is {settings['epochs']} instead of {run.settings['epochs']}{end}")
    for name, value in _canonical(settings).items():
        if name != "epochs" and name in given and value != run.about[name]:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{option} is {value}; the run in {str(folder)!r} has {run.about[name]}, and keeps it: omit {option}"
            )
    return run


def _canonical(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with absolute paths, so that a run can resume anywhere, and with each definition's own name."""
    result = dict(settings)
    for name in ("data", "test"):  # 'digits' is not a path
        if result[name] is not None and Path(result[name]).exists():
            result[name] = str(Path(result[name]).resolve())
    for name, registry in (("loss", LOSSES), ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        result[name] = registry.name_of(result[name])
    result["activation"] = ",".join(map(ACTIVATIONS.name_of, result["activation"].split(",")))
    return result


def _model(o: SimpleNamespace, d: DataSet, loss: Loss) -> MLP:
    """Return a network for these data, which knows what its inputs are made of and what its classes are called."""
    from gpubackprop.features import Features
    from gpubackprop.frames import Frame
    from gpubackprop.mlp import MLP

    table = isinstance(d.X, Frame)
    if o.missing is not None and not table:
        raise ValueError(f"--missing is for a .csv file, which {d.name} is not")
    features, standardize = None, table if o.standardize is None else o.standardize
    if table or standardize or d.scale != 1:
        try:
            features = Features.of(d.X, standardize=standardize, missing=o.missing, scale=d.scale)
        except ValueError as error:
            raise ValueError(f"{o.data!r}: {str(error).removeprefix('X: ')} (--drop leaves columns out)") from None
    inputs = d.X.shape[1] if features is None else features.inputs
    per_layer = o.activation.split(",") if "," in o.activation else o.activation
    model = MLP(_sizes(o.layers, d, loss, inputs), per_layer, loss, o.device, o.dtype, o.seed, dropout=o.dropout)
    model.describe_data(features, d.classes)
    return model


def _sizes(layers: str | None, d: DataSet, loss: Loss, inputs: int) -> list[int]:
    """Return the given layer sizes, which must fit the data, or two hidden layers."""
    kind, y = loss.kind, d.y
    largest = max(int(part.max()) for part in (d.y, d.y_validation, d.y_test) if len(part))
    n_outputs = 1 if y.ndim == 1 else y.shape[1]
    n_outputs = largest + 1 if kind.takes_indices and y.ndim == 1 else n_outputs
    sizes = options.parse_layers(layers) if layers is not None else [inputs, 64, 32, n_outputs]
    if sizes[0] != inputs or sizes[-1] < n_outputs or (not kind.takes_indices and sizes[-1] != n_outputs):
        counted = "classes" if kind.takes_indices else "targets"
        raise ValueError(
            f"--layers is {'-'.join(map(str, sizes))}; {d.name} has {inputs} inputs and {n_outputs} {counted}: "
            f"begin with {inputs} and end with {n_outputs}"
        )
    return sizes


def _check_data(data: str, model: MLP, *sets: tuple[Any, Any]) -> None:
    """Check that a model takes the samples and targets of all sets."""
    from gpubackprop.intake import Samples

    try:
        for X_part, y_part in sets:
            if len(X_part):
                Samples.given(X_part, y_part, by=model.architecture).on(model.backend, model.architecture)
    except ValueError as error:
        raise ValueError(f"{data!r}: {error}") from None


def _print_results(model: MLP, history: History, before: int, patience: int | None, result: dict[str, float]) -> None:
    """Print how a training ended; some epochs may precede it."""
    from gpubackprop.inspect.pictures import sparkline
    from gpubackprop.mlp import fingerprint

    epochs = len(history.get("loss", []))
    if history.interrupted:
        print(f"interrupted after {epochs} epochs; what was learned is kept")
    if history.diverged is not None:
        print(f"{history.diverged}; the parameters are those before step {history.diverged.kept}", file=sys.stderr)
    print(
        f"trained {epochs - before} epochs in {sum(history.get('seconds', [])[before:]):.2f} s on {model.device}, "
        f"after {history.compile_seconds:.2f} s of compiling"
    )
    if history.get("val_loss"):
        print(f"validation loss   {sparkline(history['val_loss'])}  {history['val_loss'][-1]:.4f}")
    if patience is not None and any(map(math.isfinite, history.get("val_loss", []))):
        best = min(filter(math.isfinite, history["val_loss"]))
        print(f"kept epoch {history['val_loss'].index(best) + 1}, whose validation loss {best:.4f} is the best")
    for name, value in result.items():
        print(f"test {name}: {value:.4f}")
    facts = ", ".join(f"{name} {value}" for name, value in history.determined_by.items())
    print(f"fingerprint {fingerprint(model)[:16]} ({facts})")
