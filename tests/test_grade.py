"""Golden files and the grader: networks written by hand, in Python and in C, with and without mistakes."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import pytest
from by_hand import ByHand

import gpubackprop as gb
from gpubackprop.inspect.golden import Problem, equations, read_arrays, read_golden, write_golden
from gpubackprop.inspect.grade import Grade, grade
from gpubackprop.inspect.mistakes import MISTAKES
from gpubackprop.inspect.rehearsal import Rehearsal

MSE = {"loss": "mean_squared_error"}
TABLE: list[Any] = []


def mistake(
    *names: str, activation: str = "tanh", loss: str = "softmax_cross_entropy", optimizer: str = "sgd", **methods: Any
) -> None:
    """Enter a network whose methods are replaced: each is given the network and its right method first."""
    problem = Problem(activation=activation, loss=loss, optimizer=optimizer)
    TABLE.append(pytest.param(names, problem, methods, id=" and ".join(names) or f"unknown {len(TABLE)}"))


def broken(problem: Problem, methods: dict[str, Any]) -> dict[str, np.ndarray]:
    net = ByHand(problem.activation, problem.loss, problem.optimizer, problem.given())
    for name, wrong in methods.items():
        right = getattr(net, name)
        setattr(net, name, lambda *a, wrong=wrong, right=right: wrong(net, right, *a))
    return net.run()


def scaled(factor: Callable[[list[float], int], float]) -> Any:
    return lambda s, r, o, y, n: [v * factor(o, n) for v in r(o, y, n)]


def with_transposed(s: Any, right: Any, m: str, *a: Any) -> Any:
    """A call with W^T in the square hidden layers."""
    W = s.W[m]
    s.W[m] = W if m == "o" else [list(column) for column in zip(*W, strict=True)]
    try:
        return right(m, *a)
    finally:
        s.W[m] = W


def accumulate(kinds: str) -> Any:
    """Gradients of these kinds are added to those of the first iteration."""

    def finish(s: Any, right: Any, name: str, g: Any) -> Any:
        s.memory[name] = s.memory.get(name, 0) + g
        return s.memory[name] if name[1] in kinds else g

    return finish


def no_bias(s: Any, r: Any, m: str, h: Any) -> Any:
    return [a - b for a, b in zip(r(m, h), s.b[m], strict=True)]


mistake("W transposed", affine=with_transposed)
mistake("bias forgotten", affine=no_bias)
mistake("bias forgotten", affine=lambda s, r, m, h: no_bias(s, r, m, h) if m == "o" else r(m, h))
mistake("bias after phi", hidden=lambda s, r, m, z: [s.phi(a - b) + b for a, b in zip(z, s.b[m], strict=True)])
mistake("bias sign", affine=lambda s, r, m, h: [a - 2 * b for a, b in zip(r(m, h), s.b[m], strict=True)])
mistake("phi forgotten", hidden=lambda s, r, m, z: z)
mistake("phi forgotten", activation="relu", hidden=lambda s, r, m, z: z)
mistake("phi on output", activation="relu", output=lambda s, r, z: [s.phi(v) for v in z])
mistake("softmax as output", output=lambda s, r, z: s.softmax(z))
mistake("layer order", affine=lambda s, r, m, h: r({"1": "2", "2": "1"}.get(m, m), h))
mistake("loss: sum", sample_loss=lambda s, r, o, y, n: r(o, y, n) * n)
mistake("loss: half", **MSE, sample_loss=lambda s, r, o, y, n: r(o, y, n) / 2)
mistake("loss: sum of outputs", **MSE, sample_loss=lambda s, r, o, y, n: r(o, y, n) * len(o))
mistake("loss: sign", sample_loss=lambda s, r, o, y, n: -r(o, y, n))
for by, name in ((1, "onehot + 1"), (-1, "onehot - 1")):
    other = lambda s, r, o, y, n, by=by: r(o, (y + by) % len(o), n)  # noqa: E731
    mistake(name, sample_loss=other, dloss=other)
mistake("softmax overflow", softmax=lambda s, r, o: [math.exp(v) / sum(map(math.exp, o)) for v in o])
mistake("do: sum", dloss=scaled(lambda o, n: n))
mistake("do: not / (n d)", **MSE, dloss=scaled(lambda o, n: n * len(o)))
mistake("do: not / d", **MSE, dloss=scaled(lambda o, n: len(o)))
mistake("do: 1/n twice", dloss=scaled(lambda o, n: 1 / n))
mistake("do: factor 2", **MSE, dloss=scaled(lambda o, n: 0.5))
mistake("do: sign", dloss=scaled(lambda o, n: -1))
mistake("do: no -y", dloss=lambda s, r, o, y, n: [p / n for p in s.softmax(o)])
mistake("do: no softmax", dloss=lambda s, r, o, y, n: [(v - (j == y)) / n for j, v in enumerate(o)])
mistake(
    "do: p (1 - p)",
    dloss=lambda s, r, o, y, n: [v * p * (1 - p) for v, p in zip(r(o, y, n), s.softmax(o), strict=True)],
)
mistake("do: * phi'", activation="sigmoid", **MSE,
        dloss=lambda s, r, o, y, n: [v * s.dphi(a, s.phi(a)) for v, a in zip(r(o, y, n), o, strict=True)])  # fmt: skip
mistake("dW transposed", finish=lambda s, r, k, g: g.T if k == "dW_2" else g)
mistake("dW / n", activation="relu", finish=lambda s, r, k, g: g / 5 if k[1] == "W" else g)
mistake("dW: one sample", add=lambda s, r, a, b: b if isinstance(b[0], list) else r(a, b))
mistake("dW: z for h", left=lambda s, r, h, z, k: z[k - 1] if k else h[0])
mistake("dW: wrong h", "dW: wrong h", left=lambda s, r, h, z, k: h[k + 1] if k < 2 else h[k])
mistake("dW: dh for delta", right=lambda s, r, d, dh: dh)
mistake("db: mean", finish=lambda s, r, k, g: g / 5 if k[1] == "b" else g)
mistake("db: one sample", add=lambda s, r, a, b: r(a, b) if isinstance(b[0], list) else b)
mistake("db: dh for delta", activation="relu", db=lambda s, r, d, dh: dh)
mistake("dh: W", through=with_transposed)
mistake("dh: wrong layer", through=lambda s, r, m, below, d, dh: r(m if m == "o" else below, below, d, dh))
mistake("dh: dh for delta", through=lambda s, r, m, below, d, dh: r(m, below, dh, dh))
mistake("phi' forgotten", local=lambda s, r, m, dh, z, h, zb: dh)
mistake("phi' forgotten", activation="relu", local=lambda s, r, m, dh, z, h, zb: dh if m == "1" else r(m, dh, z, h, zb))
mistake(
    "phi for phi'", activation="relu", local=lambda s, r, m, dh, z, h, zb: [g * a for g, a in zip(dh, h, strict=True)]
)
mistake(
    "phi'(h)", local=lambda s, r, m, dh, z, h, zb: [g * (1 - math.tanh(a) ** 2) for g, a in zip(dh, h, strict=True)]
)
mistake("phi'(h)", activation="sigmoid", local=lambda s, r, m, dh, z, h, zb: r(m, dh, h, s.hidden(m, h), zb))
mistake(
    "phi'(z) by h's formula", local=lambda s, r, m, dh, z, h, zb: [g * (1 - a * a) for g, a in zip(dh, z, strict=True)]
)
mistake("phi' of wrong layer", local=lambda s, r, m, dh, z, h, zb: r(m, dh, zb, s.hidden(m, zb), zb))
mistake("phi' of sigmoid", dphi=lambda s, r, z, h: h * (1 - h))
mistake("phi' at the kink", activation="relu", dphi=lambda s, r, z, h: 1.0 if z >= 0 else 0.0)
mistake("ascent", step=lambda s, r, p, v, g: v + by_hand.ETA * g)
mistake("no rate", step=lambda s, r, p, v, g: v - g)
mistake("bias not updated", step=lambda s, r, p, v, g: v if p[0] == "b" else r(p, v, g))
mistake("no momentum", optimizer="momentum", step=lambda s, r, p, v, g: v - by_hand.ETA * g)
mistake("dampened momentum", optimizer="momentum", step=lambda s, r, p, v, g: r(p, v, (1 - by_hand.MU) * g))
mistake(
    "nesterov",
    optimizer="momentum",
    step=lambda s, r, p, v, g: (r(p, v, g), v - by_hand.ETA * (g + by_hand.MU * s.memory[p]))[1],
)
mistake("adam: no correction", optimizer="adam", adam=lambda s, r, m, v, t: m / (math.sqrt(v) + by_hand.EPS))
mistake("adam: eps in root", optimizer="adam",
        adam=lambda s, r, m, v, t: m / (1 - 0.9**t) / math.sqrt(v / (1 - 0.99**t) + by_hand.EPS))  # fmt: skip
mistake("adam: t stands", optimizer="adam", adam=lambda s, r, m, v, t: r(m, v, 1))
mistake("adam: t + 1", optimizer="adam", adam=lambda s, r, m, v, t: r(m, v, t + 1))
mistake("accumulated", finish=accumulate("Wb"))
mistake("dW accumulated", finish=accumulate("W"))
mistake("bias forgotten", "phi' forgotten", affine=no_bias, local=lambda s, r, m, dh, z, h, zb: dh)
mistake(
    "do: sum",
    "db: mean",
    activation="relu",
    dloss=scaled(lambda o, n: n),
    finish=lambda s, r, k, g: g / 5 if k[1] == "b" else g,
)
mistake("do: factor 2", "dh: W", "ascent", **MSE, dloss=scaled(lambda o, n: 0.5), through=with_transposed,
        step=lambda s, r, p, v, g: v + by_hand.ETA * g)  # fmt: skip
# not in the grader's list: it should say where, and name no cause
mistake(affine=lambda s, r, m, h: r(m, [v * 1.01 for v in h]))
mistake(through=lambda s, r, m, below, d, dh: [v + 0.01 for v in r(m, below, d, dh)])
mistake(optimizer="adam", adam=lambda s, r, m, v, t: m / (1 - 0.9**t) / (abs(v) ** 0.4 + by_hand.EPS))


def graded(result: Grade, names: tuple[str, ...]) -> None:
    assert result.first is not None
    assert not result.ok
    assert len(result.names) == len(names), str(result)
    for found, name in zip(result.names, names, strict=True):
        assert found == [name], str(result)
    assert (result.unexplained == 0) == bool(names)
    assert "likely cause" in str(result)


@pytest.mark.parametrize(("names", "problem", "methods"), TABLE)
def test_a_mistake_is_found_by_its_arrays(names: tuple[str, ...], problem: Problem, methods: dict[str, Any]) -> None:
    graded(grade(broken(problem, methods), problem), names)


@pytest.mark.parametrize(
    ("names", "problem", "methods"),
    [row for row in TABLE if row.values[0] and row.values[0][0] in ("W transposed", "dh: W", "db: mean")],
)
def test_gradients_alone_are_enough(names: tuple[str, ...], problem: Problem, methods: dict[str, Any]) -> None:
    arrays = broken(problem, methods)
    graded(grade({key: a for key, a in arrays.items() if key.startswith(("dW_", "db_"))}, problem), names)


@pytest.mark.parametrize("activation", ["tanh", "relu", "sigmoid"])
@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "mean_squared_error"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_a_right_network_is_not_faulted(activation: str, loss: str, optimizer: str) -> None:
    problem = Problem(activation=activation, loss=loss, optimizer=optimizer)
    result = grade(broken(problem, {}), problem)
    assert result.ok
    assert result.given > 45
    assert str(result).endswith("0 wrong")


def test_every_mistake_in_the_list_changes_something() -> None:
    problems = [
        Problem(activation=a, loss=loss, optimizer=o)
        for a, loss, o in (
            ("tanh", "softmax_cross_entropy", "sgd"),
            ("relu", "mean_squared_error", "momentum"),
            ("tanh", "softmax_cross_entropy", "adam"),
        )
    ]
    problems.append(Problem((4, 4, 4, 4)))  # where do fits in the place of any delta
    rehearsals = [Rehearsal(problem, problem.given()) for problem in problems]
    right = [{key: a.copy() for key, a in r.run().items()} for r in rehearsals]
    for m in MISTAKES:
        changed = False
        for rehearsal, golden in zip(rehearsals, right, strict=True):
            for layer in (None, "1"):
                run = rehearsal.run([(m, layer)])
                changed |= any(not np.array_equal(a, golden[key], equal_nan=True) for key, a in run.items())
        assert changed, m.name


def test_the_updated_weights_used_too_early_are_seen() -> None:
    class Eager(ByHand):
        """Updates each layer before the gradient goes through it: whole arrays, so that the pass is repeated layer by layer."""

        def iterate(self, n: int) -> None:
            kept, new = {m: [row[:] for row in W] for m, W in self.W.items()}, {}
            self.through = lambda m, below, d, dh: [  # type: ignore[method-assign]
                sum(row[j] * d[j] for j in range(len(d))) for row in new.get(m, kept[m])
            ]
            update, self.update = self.update, lambda: None  # type: ignore[method-assign]
            for m in reversed(self.names):
                super().iterate(n)
                new[m] = (np.array(kept[m]) - by_hand.ETA * self.out[f"dW_{m}.{self.t}"]).tolist()
            super().iterate(n)
            self.update = update  # type: ignore[method-assign]
            self.update()

    problem = Problem()
    graded(grade(Eager("tanh", problem.loss, "sgd", problem.given()).run(), problem), ("dh: updated W",))


def test_the_bias_gradient_along_the_wrong_axis_is_seen() -> None:
    arrays = {key: a for key, a in broken(Problem(), {}).items() if key.endswith(".1")}
    for m, d in (("o", "do"), ("2", "delta_2"), ("1", "delta_1")):
        arrays[f"db_{m}.1"] = arrays[f"{d}.1"].sum(axis=1)
    graded(grade(arrays, Problem()), ("db: axis",))


def test_single_precision_and_columns_are_noticed_and_not_taken_for_mistakes() -> None:
    arrays = broken(Problem(), {})
    single = grade({key: a.astype(np.float32) for key, a in arrays.items()}, Problem())
    assert single.first is None
    assert not single.ok
    assert "single precision" in str(single)
    columns = {key: a.T if key[0] != "W" and key[:2] != "dW" else a for key, a in arrays.items()}
    result = grade(columns, Problem())
    assert result.ok
    assert "samples are columns" in str(result)


def test_names_that_are_not_known_are_named() -> None:
    arrays = broken(Problem(), {})
    result = grade({"dW_1": arrays["dW_1.1"], "dW_3": arrays["dW_o.1"]}, Problem())
    assert result.ok
    assert "does not have them: dW_3" in str(result)
    with pytest.raises(ValueError, match="none of the arrays has a name"):
        grade({"weights": arrays["dW_1.1"]}, Problem())
    with pytest.raises(ValueError, match="give the golden file that your network was made from"):
        grade({"dW_1": np.zeros((9, 2))}, Problem())
    other = Problem(seed=8)
    result = grade(broken(other, {}) | other.given(), Problem())
    assert "X, W_1.1, b_1.1, W_2.1, b_2.1, W_o.1, b_o.1, probe_o: begin with the arrays of the golden file" in str(
        result
    )
    assert "it does not hold real numbers" in str(grade({"dW_1": np.full((4, 4), "x")}, Problem()))


def test_a_golden_file_is_that_of_the_networks_own_passes(tmp_path: Path) -> None:
    problem = Problem((3, 5, 4, 2), "gelu", "softmax_cross_entropy", "adam", samples=7, seed=1)
    arrays = Rehearsal(problem, problem.given()).run()
    model = gb.MLP(problem.layers, "gelu", problem.loss, "reference", "float64")
    for m, W, b in zip(problem.names, model.parameters.W, model.parameters.b, strict=True):
        W[...], b[...] = arrays[f"W_{m}.1"], arrays[f"b_{m}.1"]
    trace = model.trace(arrays["X"], arrays["y"])
    assert trace.loss == arrays["loss.1"]
    for m, layer in zip(problem.names, trace.layers, strict=True):
        for kind in ("dW", "db", *(() if m == "o" else ("z", "h", "dh", "delta"))):
            np.testing.assert_array_equal(getattr(layer, kind), arrays[f"{kind}_{m}.1"])
    optimizer = gb.Adam(0.1, betas=(0.9, 0.99), eps=1e-3)
    model.fit(arrays["X"], arrays["y"], epochs=2, batch_size=7, optimizer=optimizer, shuffle=False, progress=False)
    np.testing.assert_allclose(model.parameters.W[0], arrays["W_1.3"], rtol=1e-12)


def test_a_golden_file_is_read_back_whole_from_npz_and_from_json(tmp_path: Path) -> None:
    problem = Problem((3, 4, 2), "relu", "mean_squared_error")
    arrays = Rehearsal(problem, problem.given()).run()
    for path in write_golden(tmp_path / "t.npz", problem, arrays):
        read, found = read_golden(path)
        assert read == problem
        assert list(found) == list(arrays)
        assert all(np.array_equal(a, arrays[key]) for key, a in found.items())
    about = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    assert about["format"] == 1
    for key, a in about["arrays"].items():
        assert a["equation"] in equations(problem).values()
        assert a["shape"] == list(arrays[key].shape)
    assert about["arrays"]["W_1.2"]["equation"] == "W <- W - learning_rate dW, and so b"
    assert about["arrays"]["do.1"]["equation"] == "do = d loss / d o = 2 (o − y) / (n d_o)"
    assert about["arrays"]["W_1.1"]["equation"] == "given"


@pytest.mark.parametrize(("content", "message"), [
    ("[1, 2]", "give an object with a list of rows"), ("{", "holds no arrays by name"),
    ('{"dW_1": [[1], [1, 2]]}', "differ in length"),
])  # fmt: skip
def test_a_file_that_holds_no_arrays_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_arrays(tmp_path / "m.json")
    (tmp_path / "m.npz").write_text(content)
    with pytest.raises(ValueError, match=r"m.npz' holds no arrays"):
        read_arrays(tmp_path / "m.npz")
    with pytest.raises(ValueError, match="no file"):
        read_arrays(tmp_path / "nowhere.npz")


def test_a_file_of_another_format_or_none_is_refused(tmp_path: Path) -> None:
    problem = Problem((3, 2))
    _, beside = write_golden(tmp_path / "t.npz", problem, Rehearsal(problem, problem.given()).run())
    about = json.loads(beside.read_text(encoding="utf-8"))
    beside.write_text(json.dumps(about | {"format": 2}))
    with pytest.raises(ValueError, match="has format 2; this version reads format 1"):
        read_golden(beside)
    (tmp_path / "m.json").write_text('{"dW_1": [[1, 2]]}')
    with pytest.raises(ValueError, match="is not a golden file"):
        read_golden(tmp_path / "m.json")
    with pytest.raises(ValueError, match=r"ends in \.npz"):
        write_golden(tmp_path / "t.json", problem, {})


C_MISTAKES = {
    "right": (), "phi_prime": ("phi' forgotten",), "transposed": ("dh: W",), "sum": ("do: sum",), "mean_twice": ("dW / n",),
    "db_mean": ("db: mean",), "ascent": ("ascent",), "accumulated": ("accumulated",), "bias": ("bias forgotten",),
    "last_sample": ("db: one sample",), "no_y": ("do: no -y",), "phi_of_h": ("phi'(h)",),
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network in C, whose mistake is its argument."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("c")
    given = Problem().given()
    lines = [
        f"static {'int' if key == 'y' else 'double'} {key.removesuffix('.1')}[] = {{{', '.join(map(repr, a.ravel().tolist()))}}};"
        for key, a in given.items()
        if not key.startswith("probe")
    ]
    (folder / "given.h").write_text("\n".join(lines))
    source = Path(__file__).with_name("by_hand.c")
    subprocess.run([compiler, "-O1", f"-I{folder}", "-o", folder / "net", source, "-lm"], check=True)
    return folder / "net"


@pytest.mark.parametrize("wrong", C_MISTAKES)
def test_a_mistake_in_c_is_found(compiled: Path, tmp_path: Path, wrong: str) -> None:
    done = subprocess.run([compiled, wrong], check=True, capture_output=True, text=True)
    (tmp_path / "mine.json").write_text(done.stdout)
    result = grade(read_arrays(tmp_path / "mine.json"), Problem())
    if wrong == "right":
        assert result.ok
    else:
        graded(result, C_MISTAKES[wrong])
