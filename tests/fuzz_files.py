"""Damaged files for the fuzzer: a valid file of each format, and what accident and malice do to it."""

from __future__ import annotations

import contextlib
import copy
import functools
import gzip
import io
import json
import random
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import gpubackprop as gb
from gpubackprop import csv_lines
from gpubackprop.architecture import Architecture
from gpubackprop.csv_files import read_csv, read_rows
from gpubackprop.datasets import load_dataset
from gpubackprop.features import Features
from gpubackprop.inspect.explain import random_batch
from gpubackprop.step.layout import flat_size
from gpubackprop.training.checkpoint import load_training, save

SIZES = [0, 1, 2, 7, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 0.5, 1e308, -1e-308, float("nan"), float("inf"), 10**30, 2**63, -(2**63),
    10**400, "", "x", "relu",
    "float64", "\0", "a\nb", "ü" * 50, "9" * 5000, [], {}, [1], [[]], {"name": "tanh"},
    {"name": "tanh", "parameters": {}}, [4, 20000, 20000, 2],
    [0] * 1000, "[" * 5000,
]  # fmt: skip
CELLS = [
    "", "nan", "NaN", "inf", "-inf", "1e400", "1e-400", "-0", "+5", "0x10", "1_0", "1,5", '"', '""', '"a""b"', "é",
    "\0", "\r", "\n", "\ufeff",
    "9" * 400, "1" * 3000 + "x", " " * 2000, "True", "١", "a", ";", "\t", "|", ",", ",,,,", "1.5.5", "--1", "1e",
    "2019", "?", "-", "x" * 5000,
]  # fmt: skip


def in_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return a file after a few accidents: flipped bits, lost and doubled parts, other sizes."""
    found = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        i = rng.randrange(len(found) + 1) if rng.random() < 0.5 else rng.randrange(min(len(found), 200) + 1)
        j = i + rng.choice([1, 2, 4, 8, 50, 1000])
        match rng.randrange(7):
            case 0 if i < len(found):
                found[i] ^= 1 << rng.randrange(8)
            case 1:
                del found[i:]
            case 2:
                del found[i:j]
            case 3:
                found[i:i] = found[i:j] * rng.choice([1, 2, 30])
            case 4:
                k = rng.randrange(len(found) + 1)
                found[i:i] = found[k : k + 40]
            case 5:
                width = rng.choice([1, 2, 4, 8])
                size = rng.choice(SIZES) % (1 << 8 * width)
                found[i : i + width] = size.to_bytes(width, rng.choice(["little", "big"]))  # type: ignore[arg-type]
            case _:
                found[i:j] = rng.randbytes(rng.randrange(9))
    return bytes(found)


def in_json(tree: Any, rng: random.Random) -> Any:
    """Return a document with a few nodes replaced, lost, added or nested."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = list(_places(tree))
        if not places:
            return copy.deepcopy(rng.choice(VALUES))
        parent, key = rng.choice(places)
        match rng.randrange(6):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[rng.choice(["", "extra", "name", "\n", "x" * 200])] = copy.deepcopy(rng.choice(VALUES))
            case 2:
                other, place = rng.choice(places)
                with contextlib.suppress(LookupError):  # the place may be gone
                    parent[key] = json.loads(json.dumps(other[place]))
            case 3:
                parent[key] = [copy.deepcopy(parent[key]) for _ in range(rng.choice([1, 2, 50]))]
            case _:
                parent[key] = copy.deepcopy(rng.choice(VALUES))
    return tree


def _places(tree: Any) -> Any:
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from _places(tree[key])


def as_text(tree: Any, rng: random.Random) -> bytes:
    """Return a document as bytes, now and then not as JSON has it."""
    text = json.dumps(tree).encode()
    nested = b"[" * 100_000 if rng.random() < 0.5 else b'{"a":' * 3000 + b"1" + b"}" * 3000
    return rng.choice([nested, in_bytes(text, rng), b"\xff" + text, b""]) if rng.random() < 0.2 else text


# ---------------------------------------------------------------------- data files


def check_data(path: Path, rng: random.Random) -> None:
    """Load a data set; what is loaded is whole and finite."""
    classification = rng.random() < 0.7
    d = load_dataset(path, classification=classification)
    for X, y in ((d.X, d.y), (d.X_test, d.y_test)):
        assert X.dtype == np.float64
        assert X.ndim == 2
        assert len(X) == len(y) > 0
        assert np.isfinite(X).all()
        assert y.dtype.kind in "iufb"
        assert np.isfinite(y).all()


def zipped(content: bytes, rng: random.Random) -> bytes:
    """Return a file gzipped, before or after another accident, in one of ten cases."""
    if rng.random() < 0.1:
        content = gzip.compress(content, 1)
        return in_bytes(content, rng) if rng.random() < 0.5 else content
    return content


def npz(folder: Path, rng: random.Random) -> None:
    """Run a case of an .npz file."""
    X, y = np.arange(40, dtype=rng.choice(["f4", "f8", "u1", ">i2"])).reshape(10, 4), np.arange(10) % 2
    if rng.random() < 0.2:
        y = np.array(["rose", "iris"] * 5, rng.choice(["U4", "S4"]))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        for name, a in (("X", X), ("y", y)):
            entry = io.BytesIO()
            np.save(entry, a)
            content = entry.getvalue()
            if rng.random() < 0.5:
                content = _other_header(content, rng) if rng.random() < 0.6 else in_bytes(content, rng)
            archive.writestr(
                rng.choice(["X.npy", "y", "../X.npy", " "]) if rng.random() < 0.05 else f"{name}.npy", content
            )
    content = file.getvalue() if rng.random() < 0.6 else in_bytes(file.getvalue(), rng)
    (folder / "a.npz").write_bytes(zipped(content, rng))
    check_data(folder / "a.npz", rng)


def _other_header(content: bytes, rng: random.Random) -> bytes:
    size = rng.choice([*SIZES, -1, True, "'a'", 1.5, "(" * 300, "-" * 3000 + "1"])
    shape = rng.choice(
        [f"({size},)", f"(10, {size})", f"({size}, 4)", "(4, 10)", "()", "(10, 2, 2)", str(size), "(40,)"]
    )
    descr = rng.choice(
        [
            "<f8",
            "<f4",
            "|u1",
            "<i8",
            "|O",
            "<U0",
            "<U4",
            "<c16",
            "|V8",
            "<M8[s]",
            "f8,f8",
            "|b1",
            "<f16",
            "x",
            "<f2",
            "|S40",
        ]
    )
    text = f"{{'descr': '{descr}', 'fortran_order': {rng.choice(['True', 'False', '2'])}, 'shape': {shape}}}"
    header = text.encode().ljust(117) + b"\n"
    return content[:8] + len(header).to_bytes(2, "little") + header + content[128:]


def csv(folder: Path, rng: random.Random) -> None:
    """Run a case of a .csv file."""
    separator, newline = rng.choice(",;\t|"), rng.choice(["\n", "\r\n", "\r"])
    labels = rng.choice([["0", "1"], ["rose", "iris"]])
    rows = [[f"{rng.uniform(-9, 9):.3g}", str(i), rng.choice(labels)] for i in range(rng.randint(1, 12))]
    if rng.random() < 0.5:
        rows.insert(0, ["a", "b", "y"])
    for _ in range(rng.choice([0, 1, 1, 2])):
        row = rng.choice(rows)
        row[rng.randrange(len(row))] = rng.choice(CELLS)
    content = newline.join(separator.join(row) for row in rows).encode(rng.choice(["utf-8"] * 8 + ["utf-16"]))
    (folder / "a.csv").write_bytes(zipped(in_bytes(content, rng) if rng.random() < 0.5 else content, rng))
    check_data(folder / "a.csv", rng)


def table(folder: Path, rng: random.Random) -> None:
    """Run a case of a .csv file as a table, and of the rows of another file for the network that has learned its columns."""

    def rows(n: int) -> list[list[str]]:
        found = [
            [f"{rng.uniform(-9, 9):.3g}", rng.choice(["red", "blue", ""]), str(i), rng.choice("pq")] for i in range(n)
        ]
        found.insert(0, ["a", "b", "c", "y"])
        for _ in range(rng.choice([0, 0, 1, 2])):
            row = rng.choice(found)
            row[rng.randrange(len(row))] = rng.choice(CELLS)
        return found

    def content() -> bytes:
        text = rng.choice(["\n", "\r\n"]).join(",".join(row) for row in rows(rng.randint(1, 12))).encode()
        return in_bytes(text, rng) if rng.random() < 0.3 else text

    missing = rng.random() < 0.7
    found = read_csv(content(), classification=True, frame=True, missing=missing)
    features = Features.of(found.X, standardize=rng.random() < 0.5, missing="median" if missing else None)
    matrix = features.matrix(found.X)
    assert matrix.shape == (len(found.X), features.inputs)
    assert np.isfinite(matrix).all()
    texts = [categories is not None for categories in features.categories]
    blocks = csv_lines.stream(io.BytesIO(content()))
    for X, _, _ in read_rows(blocks, names=features.names, is_text=texts):
        assert np.isfinite(features.matrix(X)).all()


def idx(folder: Path, rng: random.Random) -> None:
    """Run a case of a pair of IDX files."""
    for part, shape in (("images-idx3", (10, 3, 2)), ("labels-idx1", (10,))):
        kind = rng.choice([8, 9, 11, 12, 13, 14]) if rng.random() < 0.3 else 8
        sizes = [rng.choice(SIZES) % 2**32 if rng.random() < 0.15 else d for d in shape]
        header = bytes([0, 0, kind, len(sizes)]) + b"".join(d.to_bytes(4, "big") for d in sizes)
        width = {8: 1, 9: 1, 11: 2, 14: 8}.get(kind, 4)
        content = header + bytes(i % 3 for i in range(int(np.prod(shape)) * width))
        (folder / f"a-{part}").write_bytes(zipped(in_bytes(content, rng) if rng.random() < 0.4 else content, rng))
    check_data(folder / "a-images-idx3", rng)


# ---------------------------------------------------------------------- models and reports


@functools.cache
def model_bytes() -> bytes:
    """Return the file of a network with the state of its training."""
    model = gb.MLP([4, 5, 3], ["leaky_relu"], device="reference", seed=3)
    X, y = random_batch(model, 20, np.random.default_rng(0))
    history = model.fit(X, y, epochs=2, optimizer=gb.Adam(gb.Cosine(0.1, steps=9)), progress=False)
    with tempfile.TemporaryDirectory() as folder:
        save(model.network, Path(folder) / "a", history)
        return (Path(folder) / "a").read_bytes()


def model(folder: Path, rng: random.Random, device: str) -> None:
    """Run a case of a file of a network: any change that leaves the digest in it is found."""
    whole = model_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header, numbers = json.loads(whole[8:end]), whole[end:]
    metadata = header["__metadata__"]
    guarded = rng.random() < 0.4
    if not guarded:
        del metadata["sha256"]
        entry = rng.choice(["mlp", "mlp", "optimizer", "history"])
        metadata[entry] = as_text(in_json(json.loads(metadata[entry]), rng), rng).decode(errors="replace")
    if rng.random() < 0.4:
        header = in_json(header, rng)
    text = as_text(header, rng) if rng.random() < 0.9 else json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + numbers
    if rng.random() < 0.5:
        content = in_bytes(content, rng)
    (folder / "a.safetensors").write_bytes(content)
    network, _ = load_training(folder / "a.safetensors", device)
    mlp = gb.MLP.of(network)
    if guarded:
        assert np.array_equal(mlp.parameters.flat, _whole_model().parameters.flat)
    X = np.ones((3, mlp.layer_sizes[0]))
    assert np.isfinite(mlp.forward(X)).all()
    if network.optimizer_state is not None and mlp.layer_sizes[-1] == 3:
        mlp.fit(X, np.array([0, 1, 2]), epochs=1, optimizer=network.optimizer_state.optimizer, progress=False)


@functools.cache
def _whole_model() -> gb.MLP:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a").write_bytes(model_bytes())
        return gb.load(Path(folder) / "a", "reference")


def architecture(folder: Path, rng: random.Random) -> None:
    """Run a case of a description of a network."""
    features = Features((None, ("a", "b"), None), ("x", "y", "z"), 2.0, (0.5, "a", 1.5), (1.0, -1.0), (2.0, 3.0))
    described = {"features": features, "classes": ("p", "q", "r")} if rng.random() < 0.5 else {}
    made = Architecture(
        (4, 5, 5, 3), ["leaky_relu", "tanh"], "softmax_cross_entropy", dropout=0.5, target_shape=(), **described
    )
    a = Architecture.from_json(in_json(made.to_json(), rng))
    assert Architecture.from_json(json.loads(json.dumps(a.to_json()))) == a
    assert flat_size(a.layer_sizes) > 0


def report(folder: Path, rng: random.Random) -> None:
    """Run a case of a report of the benchmarks, as the command line shows or compares it."""
    whole, path = str(Path(__file__).with_name("golden") / "report.json"), str(folder / "report.json")
    Path(path).write_bytes(as_text(in_json(json.loads(Path(whole).read_text(encoding="utf-8")), rng), rng))
    commands = [["show", path], ["show", "--markdown", path], ["compare", path, path], ["compare", whole, path]]
    page = ["show", "--html", str(folder / "a.html"), path]  # with pictures, which take two seconds
    run_command(["bench", *(page if rng.random() < 0.02 else rng.choice(commands))])


def run_command(arguments: list[str]) -> None:
    """Run the command line in this process: it succeeds, or says what is wrong in one line."""
    from gpubackprop.cli import main

    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["gpubackprop", *arguments]
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
    if code in (0, None):
        return
    assert code == 2, f"exit status {code}"
    lines = err.getvalue().splitlines()
    assert len(lines) == 1, f"{len(lines)} lines on stderr: {err.getvalue()[:500]}"
    raise ValueError(lines[0])


FILES: dict[str, Callable[..., None]] = {
    "npz": npz,
    "csv": csv,
    "table": table,
    "idx": idx,
    "architecture": architecture,
    "report": report,
}
