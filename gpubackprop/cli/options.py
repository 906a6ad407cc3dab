"""Options shared by several commands, and their parsers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpubackprop.activations import ACTIVATIONS
from gpubackprop.losses import LOSSES
from gpubackprop.optimizers import OPTIMIZERS
from gpubackprop.registry import Registry
from gpubackprop.schedules import SCHEDULES

if TYPE_CHECKING:
    from gpubackprop.optimizers import Optimizer


def named(registry: Registry[Any], more: str = ".") -> Any:
    """Return an option whose values are names in a registry: its help lists them, and the shell completes them."""
    return typer.Option(help=", ".join(registry) + more, autocompletion=lambda: list(registry))


Layers = Annotated[str | None, typer.Option(help="Layer sizes, inputs first: 64-64-32-10.")]
Activation = Annotated[str, named(ACTIVATIONS, "; or one per hidden layer: relu,tanh.")]
LossName = Annotated[
    str | None, named(LOSSES, "; by default softmax_cross_entropy, for one output mean_squared_error.")
]
OptimizerName = Annotated[str, named(OPTIMIZERS)]
ScheduleName = Annotated[str, named(SCHEDULES)]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, auto or reference.")]
Seed = Annotated[int, typer.Option(help="Seed of initial weights, mini-batches and dropout; the same on every device.")]


def parse_layers(text: str) -> list[int]:
    """Return the numbers in ``64-32-10``."""
    try:
        return [int(part) for part in text.replace(",", "-").split("-")]
    except ValueError:
        raise ValueError(f"--layers is {text!r}; give whole numbers, inputs first, as in 64-64-32-10") from None


def loss_for(loss: str | None, layer_sizes: Sequence[int]) -> str:
    """Return the loss that was asked for, or the default for so many outputs."""
    return loss or ("mean_squared_error" if layer_sizes[-1] == 1 else "softmax_cross_entropy")


def make_optimizer(
    name: str, learning_rate: float | None, schedule: str, weight_decay: float | None, steps: int
) -> Optimizer:
    """Return the named optimizer with its defaults, and a schedule over all steps."""
    kind: Any = OPTIMIZERS.resolve(name)
    shape: Any = SCHEDULES.resolve(schedule)
    options: dict[str, Any] = {} if weight_decay is None else {"weight_decay": weight_decay}
    rate: Any = kind().learning_rate if learning_rate is None else learning_rate
    if shape is not SCHEDULES["constant"]:
        fitting = {
            "step": {"step_size": max(steps // 3, 1)},
            "exponential": {"gamma": 0.01 ** (1 / steps)},
            "linear_warmup": {"steps": max(steps // 10, 1)},
        }
        rate = shape(rate, **fitting.get(SCHEDULES.name_of(schedule), {"steps": steps}))
    try:
        result: Optimizer = kind(learning_rate=rate, **options)
    except TypeError:
        raise ValueError(f"{name} takes no weight_decay") from None
    return result
