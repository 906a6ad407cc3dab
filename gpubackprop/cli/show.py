"""``gpubackprop show``."""

from __future__ import annotations

from gpubackprop.cli.saved import RunPath


def show(run: RunPath) -> None:
    """Show a trained network: layers, columns, classes, settings of its training, and the curve of its loss."""
    from gpubackprop.cli.saved import open_saved
    from gpubackprop.inspect.pictures import sparkline
    from gpubackprop.mlp import fingerprint
    from gpubackprop.training.history import is_better_larger

    saved = open_saved(run, "cpu")
    model, history = saved.model, saved.history
    print(model.summary())
    if model.features is not None:
        print(f"features     {model.features}")
    if model.classes is not None:
        print(f"classes      {', '.join(map(str, model.classes))}")
    print(f"fingerprint  {fingerprint(model)[:16]}")
    if saved.about:
        print(
            "trained by   " + " ".join(_option(name, value) for name, value in saved.about.items() if value is not None)
        )
    if history is None:
        return
    epochs = len(history.get("loss", []))
    state = f"ended: {history.stopped}" if saved.finished else "not finished; gpubackprop train --resume continues it"
    print(f"epochs       {epochs}, {state or 'no reason kept'}")
    for name, column in history.items():
        if name not in ("seconds", "learning_rate") and column:
            best = max(column) if is_better_larger(name) else min(column)
            print(
                f"{name:12s} {sparkline(column)}  {column[-1]:.4f}, best {best:.4f} in epoch {column.index(best) + 1}"
            )


def _option(name: str, value: object) -> str:
    """Return a setting as it is typed."""
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return option if value else f"--no-{option[2:]}"
    return f"{option} {value}"
