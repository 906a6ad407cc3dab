"""From a file to a model that is used tomorrow: train, predict, evaluate, show, export, as a user runs them."""

from __future__ import annotations

import csv
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop import csv_lines
from gpubackprop.csv_files import CsvError, read_csv, read_rows
from gpubackprop.export import to_sklearn
from gpubackprop.training.scores import score, scores_of

N = 90


def people(path: Path, *, sep: str = ",") -> Path:
    """A table with numbers, text, an id, a missing cell, and labels that follow from age and sex."""
    rng = np.random.default_rng(0)
    rows = [["id", "age", "sex", "town", "paid"]]
    for i in range(N):
        age, sex = round(float(rng.normal(40, 10)), 1), str(rng.choice(["f", "m"]))
        paid = "yes" if (age > 40) == (sex == "f") else "no"
        rows.append([f"p{i}", "" if i == 7 else str(age), sex, str(rng.choice(["Ulm", "Bonn"])), paid])
    path.write_text("\n".join(sep.join(row) for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(file, folder of a training on it)."""
    folder = tmp_path_factory.mktemp("people")
    file = people(folder / "people.csv")
    code = main_in_process("train", str(file), "--target", "paid", "--drop", "id", "--missing", "median", "--epochs", "200",
                           "--layers", "5-16-2", "--learning-rate", "0.01", "--out", str(folder / "run"), "--quiet")  # fmt: skip
    assert code == 0
    return file, folder / "run"


def main_in_process(*arguments: str) -> int:
    import sys

    from gpubackprop.cli import main

    before, sys.argv = sys.argv, ["gpubackprop", *arguments]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


# ---------------------------------------------------------------------- predict


def test_predictions_are_the_models_for_columns_in_any_order(run: Any, trained: Any, tmp_path: Path):
    pd = pytest.importorskip("pandas")
    file, folder = trained
    frame = pd.read_csv(file)
    other = tmp_path / "other.csv"
    frame[["town", "sex", "id", "age"]].to_csv(other, index=False, sep=";", decimal=",")
    model = gb.load(folder / "model.safetensors")
    assert model.classes == ("no", "yes")
    assert model.features.names == ("age", "sex", "town")
    status, out, err = run("predict", str(folder), str(other), "--probabilities")
    assert (status, err) == (0, "")
    found = rows_of(out)
    assert [row["prediction"] for row in found] == list(model.predict(frame))
    expected = model.predict_proba(frame)
    np.testing.assert_array_equal(
        [[np.float32(row[f"probability_{c}"]) for c in model.classes] for row in found], expected
    )


@pytest.mark.parametrize("name", ["out.csv", "out.parquet"])
def test_predictions_are_written_whole_or_not_at_all(run: Any, trained: Any, tmp_path: Path, name: str):
    from pyarrow import csv as arrow_csv
    from pyarrow import parquet

    file, folder = trained
    out = tmp_path / name
    assert run("predict", str(folder), str(file), "--out", str(out), "--probabilities")[:2] == (
        0,
        f"wrote 90 predictions to {out}\n",
    )
    table = parquet.read_table(out) if name.endswith("parquet") else arrow_csv.read_csv(out)
    assert table.column_names == ["prediction", "probability_no", "probability_yes"]
    assert table.num_rows == N
    bad = tmp_path / "bad.csv"
    bad.write_text(file.read_text().replace("Ulm", "Rom", 1))
    status, _, err = run("predict", str(folder), str(bad), "--out", str(tmp_path / f"new-{name}"))
    assert status == 2
    assert "column 'town' of sample " in err
    assert "is 'Rom'; in training it was one of ['Bonn', 'Ulm']" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["bad.csv", name])


def test_a_file_larger_than_a_block_is_read_in_blocks(run: Any, trained: Any, tmp_path: Path, monkeypatch: Any):
    import gzip

    file, folder = trained
    _, whole, _ = run("predict", str(folder), str(file))
    monkeypatch.setattr(csv_lines, "FIRST_BLOCK", 300)
    monkeypatch.setattr(csv_lines, "BLOCK", 200)
    assert run("predict", str(folder), str(file))[1] == whole
    packed = tmp_path / "people.csv.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert run("predict", str(folder), str(packed))[1] == whole
    wide = tmp_path / "wide.csv"
    wide.write_text(file.read_text(), encoding="utf-16")
    assert run("predict", str(folder), str(wide))[1] == whole
    late = tmp_path / "late.csv"
    late.write_text(file.read_text() + "p90,old,f,Ulm,yes\n")
    status, _, err = run("predict", str(folder), str(late))
    assert (status, "row 92, column 'age' is 'old', which is not a number" in err) == (2, True)
    late.write_text(file.read_text() + "p90,40,x,Ulm,yes\n")
    assert "column 'sex' of sample 91 is 'x'" in run("predict", str(folder), str(late))[2]
    packed.write_bytes(packed.read_bytes()[:-20])
    assert "truncated or not a valid gzip file" in run("predict", str(folder), str(packed))[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace("town", "city", 1), "it has no column 'town'; its columns are ['id', 'age', 'sex', 'city', 'paid']"),
        (lambda t: t.split("\n", 1)[1], "the network takes 3, named ['age', 'sex', 'town']"),
        (lambda t: "", "it is empty"),
        (lambda t: t[: t.index("\n") + 1], "has no samples"),
        (lambda t: t.replace("p3,", 'p3,"', 1), "row 5 has a quotation mark that is not closed"),
        (lambda t: t.replace("p3,", "p3\0,", 1), "row 5 holds a NUL byte: it is not a text file"),
        (lambda t: t.replace("p3,", "p3,1,", 1), "row 5 has 6 columns, the first has 5"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_named(run: Any, trained: Any, tmp_path: Path, change: Any, message: str):
    file, folder = trained
    bad = tmp_path / "bad.csv"
    bad.write_text(change(file.read_text()))
    status, _, err = run("predict", str(folder), str(bad))
    assert status == 2
    assert err.startswith(f"gpubackprop: '{bad}'")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "nowhere", "x.csv"], "no folder or file 'nowhere'; give the folder of a training"),
        (["predict", "{run}", "nowhere.csv"], "no file 'nowhere.csv'"),
        (["predict", "{run}", "{file}", "--out", "x.txt"], "--out is 'x.txt'; it must end with .csv or .parquet"),
        (["evaluate", "{run}", "{file}", "--target", "age"], "the target, column 'age', is one of the features; name another"),
        (["evaluate", "{run}", "{file}", "--target", "id"], "y of sample 1 is 'p0', which is none of the classes ['no', 'yes']"),
        (["evaluate", "{run}", "{file}", "--target", "nix"], "no column is called 'nix'"),
        (["export", "{run}", "--to", "x.onnx"], "--to is 'x.onnx'; it must end with .safetensors, .npz or .pkl"),
        (["export", "{run}", "--to", "x.pkl"], "scikit-learn's estimator takes numbers without gaps; the network takes 3 columns"),
        (["show", "{file}"], "is not a complete safetensors file"),
        (["train", "{file}"], "row 9, column 'age' is missing; fill it in, or remove the row or the column; --missing median"),
        (["train", "{file}", "--missing", "median"], "people.csv': column 'id' holds 65 different texts in 65 samples"),
        (["train", "{file}", "--missing", "mean", "--drop", "id"], "missing is 'mean'; choose 'median'"),
        (["train", "{file}", "--drop", "nix"], "no column is called 'nix'"),
        (["train", "{file}", "--delimiter", "x"], "delimiter is 'x'; choose , ; | or tab"),
        (["train", "digits", "--missing", "median"], "--missing is for a .csv file, which digits is not"),
        (["train", "digits", "--delimiter", ";"], "delimiter is an option of a file"),
    ],
)  # fmt: skip
def test_mistakes_are_named(
    run: Any, trained: Any, tmp_path: Path, monkeypatch: Any, arguments: list[str], message: str
):
    monkeypatch.chdir(tmp_path)
    file, folder = trained
    status, _, err = run(*(a.format(file=file, run=folder) for a in arguments))
    assert status == 2
    assert message in err
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- evaluate


def test_scores_are_scikit_learns(run: Any, trained: Any):
    from sklearn import metrics

    pd = pytest.importorskip("pandas")
    file, folder = trained
    frame, model = pd.read_csv(file), gb.load(folder / "model.safetensors")
    status, out, _ = run("evaluate", str(folder), str(file), "--json")
    assert status == 0
    found, predicted = json.loads(out), model.predict(frame)
    assert found["overall"]["accuracy"] == metrics.accuracy_score(frame.paid, predicted) > 0.9
    assert found["overall"]["roc_auc"] == pytest.approx(
        metrics.roc_auc_score(frame.paid == "yes", model.predict_proba(frame)[:, 1])
    )
    assert found["confusion"] == metrics.confusion_matrix(frame.paid, predicted).tolist()
    assert found["classes"]["yes"]["f1"] == metrics.f1_score(frame.paid, predicted, pos_label="yes")
    assert score(model, frame, frame.paid).to_json() == found
    assert f"accuracy           {found['overall']['accuracy']:.4f}" in run("evaluate", str(folder), str(file))[1]


def test_scores_of_numbers_and_of_classes_that_are_missing():
    from gpubackprop.losses import LOSSES

    rng = np.random.default_rng(0)
    y, o = rng.normal(size=(20, 2)), rng.normal(size=(20, 2))
    real = scores_of(LOSSES["mean_squared_error"].kind, y, o).overall
    assert real["rmse"] == pytest.approx(np.sqrt(((y - o) ** 2).mean()))
    assert real["mae"] == pytest.approx(abs(y - o).mean())
    assert np.isnan(scores_of(LOSSES["mean_squared_error"].kind, y[:1], o[:1]).overall["r2"])
    some = scores_of(
        LOSSES["softmax_cross_entropy"].kind, [0, 0, 1], np.array([0, 1, 1]), np.full((3, 3), 1 / 3), ["a", "b", "c"]
    )
    assert "roc_auc" not in some.overall  # c has no sample
    assert some.classes["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "samples": 0}
    assert some.confusion == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert "c         0.0000" in str(some)


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        ("mean_squared_error", np.random.default_rng(1).normal(size=(40, 2))), ("sigmoid_cross_entropy", np.arange(40) % 2),
        ("poisson", np.arange(40) % 5), ("hinge", np.where(np.arange(40) % 2, 1, -1)),
    ],
)  # fmt: skip
def test_files_of_arrays_and_every_kind_of_target(run: Any, tmp_path: Path, loss: str, y: np.ndarray):
    X = np.random.default_rng(0).normal(size=(40, 3))
    np.savez(tmp_path / "a.npz", X=X, y=y)
    np.savez(tmp_path / "X.npz", X=X)
    out = str(tmp_path / "run")
    assert run("train", str(tmp_path / "a.npz"), "--loss", loss, "--out", out, "--quiet", "--epochs", "2")[0] == 0
    assert run("evaluate", out, str(tmp_path / "a.npz"))[0] == 0
    _, predicted, _ = run("predict", out, str(tmp_path / "X.npz"))
    expected = gb.load(f"{out}/model.safetensors").predict(X)
    found = np.loadtxt(io.StringIO(predicted), expected.dtype, delimiter=",", skiprows=1)
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)


def test_bytes_and_digits_keep_their_scale(run: Any, tmp_path: Path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 8, 8), np.uint8)
    np.savez(tmp_path / "b.npz", X=images, y=(images.mean(axis=(1, 2)) > 127).astype(int))
    np.savez(tmp_path / "f.npz", X=images / 255)
    out = str(tmp_path / "run")
    assert run("train", str(tmp_path / "b.npz"), "--out", out, "--quiet", "--epochs", "2")[0] == 0
    model = gb.load(f"{out}/model.safetensors")
    assert model.features.scale == 255
    np.testing.assert_array_equal(
        model.forward(images.reshape(60, -1)), model.twin(features=None).forward(images.reshape(60, -1) / 255)
    )
    assert run("evaluate", out, str(tmp_path / "b.npz"))[0] == 0
    status, _, err = run("predict", out, str(tmp_path / "f.npz"))
    assert (status, "its features are real numbers; the network takes bytes, and divides them by 255" in err) == (
        2,
        True,
    )


def test_labels_that_are_numbers_stay_numbers(run: Any, tmp_path: Path):
    X = np.random.default_rng(0).normal(size=(60, 2))
    np.savetxt(tmp_path / "n.csv", np.c_[X, np.where(X[:, 0] > 0, 7, 3)], delimiter=",")
    out = str(tmp_path / "run")
    assert run("train", str(tmp_path / "n.csv"), "--out", out, "--quiet", "--epochs", "60")[0] == 0
    assert gb.load(f"{out}/model.safetensors").classes == (3, 7)
    assert json.loads(run("evaluate", out, str(tmp_path / "n.csv"), "--json")[1])["overall"]["accuracy"] > 0.8


# ---------------------------------------------------------------------- show and export


def test_show_says_what_it_is_and_how_it_was_trained(run: Any, trained: Any, tmp_path: Path):
    _, folder = trained
    status, out, _ = run("show", str(folder))
    assert status == 0
    for text in (
        "5-16-2", "features     3 columns (5 inputs); 'sex': f, m; 'town': Bonn, Ulm; missing values by the median; standardized",
        "classes      no, yes", "--target paid", "epochs       200, ended: epochs", "val_loss", "fingerprint",
    ):  # fmt: skip
        assert text in out
    assert run("show", str(folder / "model.safetensors"))[0] == 0


def test_an_unfinished_run_is_used_at_its_checkpoint_and_said(run: Any, trained: Any, tmp_path: Path):
    import shutil

    file, folder = trained
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    status, _, err = run("predict", str(tmp_path / "run"), str(file))
    assert (status, err) == (0, f"{tmp_path / 'run'} is not finished: the network of its last checkpoint predicts\n")
    assert "not finished" in run("show", str(tmp_path / "run"))[1]


def test_exported_arrays_compute_the_outputs(run: Any, trained: Any, tmp_path: Path):
    _, folder = trained
    model = gb.load(folder / "model.safetensors")
    assert run("export", str(folder), "--to", str(tmp_path / "m.npz"))[0] == 0
    with np.load(tmp_path / "m.npz") as arrays:
        assert json.loads(str(arrays["architecture"]))["classes"] == ["no", "yes"]
        x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
        o = np.maximum(x @ arrays["W_1"] + arrays["b_1"], 0) @ arrays["W_2"] + arrays["b_2"]
    np.testing.assert_allclose(o, model.twin(features=None).forward(x), rtol=1e-4, atol=1e-5)
    assert run("export", str(folder), "--to", str(tmp_path / "f.safetensors"), "--fold")[0] == 0
    assert gb.load(tmp_path / "f.safetensors").features.mean is None


@pytest.mark.parametrize(
    ("loss", "outputs", "y"),
    [
        ("softmax_cross_entropy", 3, ["c", "a", "b"] * 20), ("softmax_cross_entropy", 2, ["x", "y"] * 30),
        ("sigmoid_cross_entropy", 1, ["x", "y"] * 30), ("sigmoid_cross_entropy", 3, np.eye(3)[np.arange(60) % 3]),
        ("mean_squared_error", 1, np.arange(60.0)), ("mean_squared_error", 2, np.random.default_rng(0).normal(size=(60, 2))),
    ],
)  # fmt: skip
@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid", "identity"])
def test_scikit_learns_estimator_predicts_the_same(loss: str, outputs: int, y: Any, activation: str):
    X = np.random.default_rng(0).normal(3, 2, size=(60, 4))
    model = gb.MLP([4, 8, outputs], activation, loss, dtype="float64")
    model.fit(X, y, epochs=3, standardize=True, progress=False)
    made = pickle.loads(pickle.dumps(to_sklearn(model)))
    if loss != "mean_squared_error":
        p = model.predict_proba(X)
        p = np.hstack([1 - p, p]) if outputs == 1 else p
        np.testing.assert_allclose(made.predict_proba(X), p, rtol=1e-9, atol=1e-12)
    if outputs == 3 and loss == "sigmoid_cross_entropy":
        return
    np.testing.assert_allclose(made.predict(X), model.predict(X), rtol=1e-9) if loss == "mean_squared_error" else (
        np.testing.assert_array_equal(made.predict(X), model.predict(X))
    )


def test_classes_in_another_order_are_sorted_for_scikit_learn():
    X = np.random.default_rng(0).normal(size=(60, 4))
    for classes in (["z", "m", "a"], ["z", "a"]):
        model = gb.MLP([4, 8, len(classes)], dtype="float64")
        model.fit(X, classes * (60 // len(classes)), classes=classes, epochs=3, progress=False)
        made = to_sklearn(model)
        np.testing.assert_array_equal(made.predict(X), model.predict(X))
        np.testing.assert_allclose(made.predict_proba(X), model.predict_proba(X)[:, np.argsort(classes)], rtol=1e-9)


def test_what_scikit_learn_has_not_is_said():
    with pytest.raises(
        ValueError, match=r"scikit-learn has one activation of relu, tanh, sigmoid, identity; the network has gelu"
    ):
        to_sklearn(gb.MLP([2, 3, 2], "gelu"))
    with pytest.raises(ValueError, match="scikit-learn has no huber"):
        to_sklearn(gb.MLP([2, 3, 2], loss="huber"))


# ---------------------------------------------------------------------- tables in CSV files


def frame(text: str, **options: Any) -> Any:
    return read_csv(text.encode(), classification=True, frame=True, **options).X


def test_text_and_missing_cells_of_a_table():
    table = frame("a,b,c,y\n1,x,?,p\n2,,4,q\nNA,z z,5,p\n", missing=True)
    assert table.names == ("a", "b", "c")
    np.testing.assert_array_equal(table.numbers, [[1, np.nan], [2, 4], [np.nan, 5]])
    assert table.texts[1].tolist() == ["x", None, "z z"]
    assert frame("1,x,p\n2,y,q\n").names is None
    assert frame("a;b;y\n1,5;x;p\n2,5;x;q\n", drop=["b"], delimiter=";").numbers.tolist() == [[1.5], [2.5]]
    assert frame("a,b,y\n1,x,p\n2,x,q\n", drop=["1"]).names == ("b",)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,b,y\n1,x,p\n,x,q\n", {}, "row 3, column 'a' is missing; fill it in"),
        ("a,b,y\n1,x,p\n2,?,q\n", {}, r"row 3, column 'b' is missing \('\?'\)"),
        ("a,b,y\n1,x,p\n2,3,q\n", {"missing": True}, "row 2, column 'b' is 'x', which is not a number"),
        ("a,a,y\n1,2,p\n2,3,q\n", {}, "two columns are called 'a'; give them different names, or drop one"),
        ("a,b,y\n1,x,p\n2,x,q\n", {"drop": ["a", "b"]}, "no column is left as a feature"),
        ("u,v,y\nx,w,p\nx,w,q\n", {}, "row 1 may be a header or a sample"),
        ("a,b,y\n1,2,p\ninf,3,q\n", {"missing": True}, "row 3, column 'a' is 'inf', which is not a finite number"),
    ],
)
def test_a_table_that_cannot_be_used(text: str, options: Any, message: str):
    with pytest.raises(CsvError, match=message):
        frame(text, **options)


def test_rows_are_read_alike_in_blocks_of_any_size(monkeypatch: Any):
    text = "b,a,more\r\n" + "".join(f"{'xyz'[i % 3]},{i},9\r\n" for i in range(50))
    for size in (20, 33, 100, 10_000):
        monkeypatch.setattr(csv_lines, "FIRST_BLOCK", size)
        monkeypatch.setattr(csv_lines, "BLOCK", size)
        parts = [
            X
            for X, _, _ in read_rows(
                csv_lines.stream(io.BytesIO(text.encode())), names=["a", "b"], is_text=[False, True]
            )
        ]
        assert np.concatenate([X.numbers[:, 0] for X in parts]).tolist() == list(range(50))
        assert "".join("".join(X.texts[1]) for X in parts) == ("xyz" * 17)[:50]
        assert [X.first for X in parts] == [1 + sum(len(X) for X in parts[:i]) for i in range(len(parts))]
