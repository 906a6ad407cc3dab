"""Golden files: every array of a forward phase, a backward phase and an update, in float64, to compare another implementation with.

The arrays are those of the reference backend's own step, see :mod:`gpubackprop.inspect.rehearsal`.

The network is small and square by default (4-4-4-3): a transposed or misplaced matrix fits there, and shows only in the numbers.
Biases are not zero, the number of samples differs from all layer sizes, and two iterations show the state kept between them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpubackprop._version import __version__
from gpubackprop.activations import ACTIVATIONS
from gpubackprop.architecture import check_layer_sizes
from gpubackprop.archives import limit_of, read_npz
from gpubackprop.definitions import Array, check_count, check_seed
from gpubackprop.inspect.notation import loss_in_words
from gpubackprop.losses import LOSSES
from gpubackprop.machine.files import write_whole
from gpubackprop.optimizers import SGD, Adam, Optimizer

FORMAT = 1
ITERATIONS = 2
RATE, MOMENTUM, BETA1, BETA2, EPS = 0.1, 0.9, 0.9, 0.99, 1e-3  # eps is large, so that its place shows
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": SGD(RATE),
    "momentum": SGD(RATE, momentum=MOMENTUM),
    "adam": Adam(RATE, betas=(BETA1, BETA2), eps=EPS),
}
READ_ME = [
    "Start from X, y, W_l.1 and b_l.1, and take two iterations of gradient descent over the whole batch.",
    "Rows are samples: X is (n, d_0), W_l is (d_{l-1}, d_l), z_l = h_{l-1} W_l + b_l. Layers are 1, 2, ... and o, the output.",
    "NAME.1 and NAME.2 are of the first and the second iteration; W_l.2 and b_l.2 are the parameters after the first update.",
    "probe_phi and probe_dphi are phi and phi' at probe_z; probe_loss and probe_do are the loss and its gradient at probe_o.",
    "Hand in a JSON object or an .npz file with any of these arrays under these names; '.1' may be omitted.",
    "In JSON an array is a list of its rows; NaN and Infinity are allowed. Compute and write in double precision.",
]
UPDATES = {
    "sgd": "W <- W - learning_rate dW, and so b",
    "momentum": "v <- momentum v + dW, v = 0 at first;  W <- W - learning_rate v, and so b",
    "adam": "m <- beta1 m + (1 - beta1) dW;  v <- beta2 v + (1 - beta2) dW^2, both 0 at first;  "
    "W <- W - learning_rate (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps), t = 1, 2;  and so b",
}


@dataclass(frozen=True)
class Problem:
    """The problem of a golden file; names are checked here."""

    layers: tuple[int, ...] = (4, 4, 4, 3)
    activation: str = "tanh"
    loss: str = "softmax_cross_entropy"
    optimizer: str = "sgd"
    samples: int = 5
    seed: int = 7

    def __post_init__(self) -> None:
        object.__setattr__(self, "activation", ACTIVATIONS.resolve(self.activation).name)
        object.__setattr__(self, "loss", LOSSES.resolve(self.loss).name)
        object.__setattr__(self, "layers", check_layer_sizes(self.layers, LOSSES.resolve(self.loss)))
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}; choose from {', '.join(OPTIMIZERS)}")
        check_count("samples", self.samples)
        check_seed(self.seed)

    @property
    def names(self) -> list[str]:
        """Of the layers."""
        return [*map(str, range(1, len(self.layers) - 1)), "o"]

    def given(self) -> dict[str, Array]:
        """Return the inputs of a run: features, targets, parameters, and extreme arguments."""
        rng, (d_0, d_o), kind = (
            np.random.default_rng(self.seed),
            (self.layers[0], self.layers[-1]),
            LOSSES[self.loss].kind,
        )
        a: dict[str, Array] = {"X": rng.normal(size=(self.samples, d_0))}
        a["y"] = np.arange(self.samples) * 2 % d_o if kind.takes_indices else kind.random(rng, self.samples, d_o)
        for m, p, q in zip(self.names, self.layers, self.layers[1:], strict=False):
            a[f"W_{m}.1"], a[f"b_{m}.1"] = rng.normal(size=(p, q)) / p**0.5, rng.normal(size=q) / 2
        top = 800.0 if self.loss.endswith("cross_entropy") else 3.0  # e^800 overflows
        a["probe_z"] = np.array([-30.0, -2.0, -0.5, 0.0, 0.5, 2.0, 30.0])
        a["probe_o"] = np.concatenate([[np.linspace(top, -top, d_o)], rng.normal(size=(3, d_o))])
        a["probe_y"] = np.arange(3, -1, -1) % d_o if kind.takes_indices else kind.random(rng, 4, d_o)
        return a


def equations(problem: Problem) -> dict[str, str]:
    """Return the equation of each kind of array, "given" for inputs."""
    loss, do = loss_in_words(LOSSES[problem.loss], problem.given()["y"])
    return {
        "z": "z_l = h_{l-1} W_l + b_l, where h_0 is X", "h": f"h_l = phi(z_l), phi = {problem.activation}",
        "o": "o = h_L W_o + b_o", "loss": f"loss = {loss}", "do": f"do = d loss / d o = {do}",
        "dW": "dW_l = h_{l-1}^T delta_l, where delta_o is do", "db": "db_l = sum over rows of delta_l",
        "dh": "dh_l = delta_{l+1} W_{l+1}^T", "delta": "delta_l = dh_l * phi'(z_l)", "update": UPDATES[problem.optimizer],
        "probe": "phi, phi', loss and do at extreme arguments", "given": "given",
    }  # fmt: skip


def equation_of(key: str, problem: Problem) -> str:
    """Return the equation that an array is computed by."""
    found = equations(problem)
    return found["given"] if key in problem.given() else found.get(kind_of(key), found["update"])


def write_golden(path: Path, problem: Problem, arrays: Mapping[str, Array]) -> list[Path]:
    """Write arrays into an .npz file and, with their equations, into a .json file next to it; returns both paths."""
    if path.suffix != ".npz":
        raise ValueError(f"--out is {str(path)!r}; give a name that ends in .npz; the .json file is written next to it")
    about, beside = _about(problem), path.with_suffix(".json")
    described = {
        key: {"equation": equation_of(key, problem), "shape": a.shape, "values": a.tolist()}
        for key, a in arrays.items()
    }
    write_whole(beside, _json(about, described).encode())
    buffer = io.BytesIO()
    np.savez(buffer, about=np.array(json.dumps(about)), **arrays)
    write_whole(path, buffer.getvalue())
    return [path, beside]


def _json(about: dict[str, Any], arrays: dict[str, Any]) -> str:
    """Return all of it as JSON, one array per line."""
    head = "".join(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)},\n" for key, value in about.items())
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(a, ensure_ascii=False)}" for key, a in arrays.items())
    return f'{{\n{head} "arrays": {{\n{lines}\n }}\n}}\n'


def read_golden(path: Path) -> tuple[Problem, dict[str, Array]]:
    """Return the problem and the arrays of a golden file, .npz or .json."""
    arrays = read_arrays(path)
    about = arrays.pop("about", None)
    if about is None:
        raise ValueError(f"{str(path)!r} is not a golden file: it has no description; gpubackprop golden writes one")
    fields = json.loads(str(about))
    if fields["format"] != FORMAT:
        raise ValueError(
            f"{str(path)!r} has format {fields['format']}; this version reads format {FORMAT}: write it again"
        )
    return Problem(**fields["problem"] | {"layers": tuple(fields["problem"]["layers"])}), arrays


def read_arrays(path: Path) -> dict[str, Array]:
    """Return the arrays in an .npz or .json file, as they are; the values of a golden file's own JSON."""
    try:
        if path.suffix == ".json":
            return _from_json(json.loads(path.read_text(encoding="utf-8")))
        return read_npz(path.read_bytes(), None, limit_of(path))[0]
    except FileNotFoundError:
        raise ValueError(f"no file {str(path)!r}") from None
    except ValueError as error:
        raise ValueError(f"{str(path)!r} holds no arrays by name, as .npz or .json: {error}") from None


def _from_json(found: Any) -> dict[str, Array]:
    if not isinstance(found, dict):
        raise ValueError("give an object with a list of rows for each array")
    if isinstance(found.get("arrays"), dict):  # a golden file
        about = {key: value for key, value in found.items() if key != "arrays"}
        found = {key: a["values"] for key, a in found["arrays"].items()}
        return {"about": np.array(json.dumps(about))} | {key: np.array(a) for key, a in found.items()}
    arrays = {}
    for key, rows in found.items():
        try:
            arrays[key] = np.array(rows)
        except ValueError:
            raise ValueError(f"the rows of {key!r} differ in length") from None
    return arrays


def kind_of(key: str) -> str:
    """Return the kind of array that a key names: "dW" of "dW_1.2"."""
    return key.partition(".")[0].partition("_")[0]


def _about(problem: Problem) -> dict[str, Any]:
    return {
        "format": FORMAT, "written_by": f"gpubackprop {__version__}", "read_me": READ_ME, "equations": equations(problem),
        "problem": asdict(problem), "learning_rate": RATE, "momentum": MOMENTUM, "betas": [BETA1, BETA2], "eps": EPS,
        "iterations": ITERATIONS,
    }  # fmt: skip
