"""What the inputs of a network are made of, and the labels of its classes: kept with it, and right or named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpubackprop as gb
from gpubackprop.architecture import Architecture
from gpubackprop.features import Features
from gpubackprop.frames import Frame, frame_of
from gpubackprop.labels import check_classes, indices_of, weights_of

pd: Any = pytest.importorskip("pandas")
pl: Any = pytest.importorskip("polars")
preprocessing: Any = pytest.importorskip("sklearn.preprocessing")
N = 60


def table(seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return pd.DataFrame({
        "age": rng.normal(40, 10, N), "sex": rng.choice(["f", "m"], N), "rooms": rng.integers(0, 5, N), "new": rng.random(N) > 0.5,
        "town": rng.choice(["Ulm", "Bonn", "Köln"], N),
    })  # fmt: skip


def labels(frame: Any) -> np.ndarray:
    return np.where((frame.age > 40) & (frame.sex == "f"), "yes", "no")


def trained(frame: Any, y: Any, device: str = "cpu", **options: Any) -> gb.MLP:
    model = gb.MLP([8, 16, 2], device=device, seed=1)
    model.fit(frame, y, epochs=5, batch_size=16, progress=False, **options)
    return model


# ---------------------------------------------------------------------- what is computed


def test_numbers_are_those_of_scikit_learns_transformers():
    from sklearn.compose import make_column_transformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline

    frame = table()
    frame.loc[[3, 8], "age"] = np.nan
    numbers, texts = ["age", "rooms", "new"], ["sex", "town"]
    theirs = make_column_transformer(
        (make_pipeline(SimpleImputer(strategy="median"), preprocessing.StandardScaler()), numbers),
        (preprocessing.OneHotEncoder(sparse_output=False), texts),
    ).fit(frame)
    features = Features.of(frame, standardize=True, missing="median")
    # mean and std are sums over 60 numbers in another order
    np.testing.assert_allclose(features.matrix(frame), theirs.transform(frame), rtol=60 * np.finfo(float).eps)
    assert features.inputs == 8
    assert features.input_names == ("age", "rooms", "new", "sex=f", "sex=m", "town=Bonn", "town=Köln", "town=Ulm")


@pytest.mark.parametrize("read", [pd.DataFrame, pl.from_pandas, lambda f: pl.from_pandas(f).to_arrow(), frame_of])
def test_columns_in_any_order_of_any_library(read: Any):
    frame = table()
    features = Features.of(frame, standardize=True)
    other = read(frame[["town", "rooms", "sex", "new", "age"]].assign(more="left out"))
    np.testing.assert_array_equal(features.matrix(other), features.matrix(frame))


def test_categories_of_pandas_and_missing_text():
    frame = pd.DataFrame(
        {"a": pd.Categorical(["x", None, "y", "x"]), "b": [1.0, 2, 3, 4], "c": pd.array([1, None, 3, 4], "Int64")}
    )
    features = Features.of(frame, missing="median")
    np.testing.assert_array_equal(features.matrix(frame), [[1, 1, 1, 0], [2, 3, 1, 0], [3, 3, 0, 1], [4, 4, 1, 0]])
    assert features.fill == ("x", 2.5, 3.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(columns=["sex", "age"]), r"X has no column 'age', 'sex'; it has \['rooms', 'new', 'town'\]"),
        (lambda f: f.assign(sex=1.0), "X has numbers in column 'sex'; the network takes text there"),
        (lambda f: f.assign(age="old"), "X has text in column 'age'; the network takes numbers there"),
        (lambda f: f.assign(town="Rom"), r"X: column 'town' of sample 1 is 'Rom'; in training it was one of .*'Köln'"),
        (lambda f: f.assign(age=np.nan), r"X: column 'age' of sample 1 is missing \(NaN\); missing='median' fills it in"),
        (lambda f: f.assign(age=np.inf), "X: column 'age' of sample 1 is infinite"),
        (lambda f: f.assign(sex=[None] + ["f"] * (N - 1)), "X: column 'sex' of sample 1 is missing; missing='median'"),
        (lambda f: f.assign(age=pd.Timestamp("2026-01-01")), "X has column 'age' of Datetime.*sample 1 is .*2026.*give numbers"),
        (lambda f: pl.LazyFrame(pl.from_pandas(f)), r"X is a LazyFrame, which is not read yet: collect\(\) it first"),
        (lambda f: pd.concat([f, f], axis=1), "X .*column.*'age'"),
        (lambda f: np.zeros((3, 4)), "X has 4 columns; the network takes 5"),
        (lambda f: f[:0], r"there are no samples"),
    ],
)  # fmt: skip
def test_a_table_that_does_not_fit_is_named(change: Any, message: str):
    frame = table()
    model = trained(frame, labels(frame))
    with pytest.raises(ValueError, match=message):
        model.predict(change(frame))


@pytest.mark.parametrize(
    ("frame", "options", "message"),
    [
        (table().assign(name=[f"n{i}" for i in range(N)]), {}, "'name' holds 60 different texts in 60 samples, such as 'n0'"),
        (table().assign(age=np.nan), {"missing": "median"}, "column 'age' is missing in all samples; leave it out"),
        (table().assign(sex=None), {"missing": "median"}, "column 'sex' is missing in all samples|neither|Null|Object|Unknown"),
        (table(), {"missing": "mean"}, "missing is 'mean'; choose 'median'"),
        (table(), {"standardize": 1}, "standardize is 1; it must be True or False"),
        (table(), {"scale": 0}, "scale is 0; it must be a number > 0"),
        (np.zeros(3), {"standardize": True}, r"X has shape \(3,\) and dtype float64; it must be numbers \(samples, columns\)"),
        (np.zeros((3, 2), complex), {"standardize": True}, "complex128"),
    ],
)  # fmt: skip
def test_training_data_that_cannot_be_features(frame: Any, options: Any, message: str):
    with pytest.raises(ValueError, match=message):
        gb.MLP([8, 2]).fit(frame, ["a", "b"] * (len(frame) // 2) + ["a"] * (len(frame) % 2), progress=False, **options)


def test_layer_sizes_that_do_not_fit_say_which_do():
    frame = table()
    with pytest.raises(ValueError, match=r"8 inputs; layer_sizes begins with 5: begin with 8"):
        gb.MLP([5, 2]).fit(frame, labels(frame), progress=False)
    with pytest.raises(ValueError, match=r"there are 2 classes \(no, yes\); layer_sizes ends with 3: end with 2"):
        gb.MLP([8, 3]).fit(frame, labels(frame), progress=False)
    with pytest.raises(
        ValueError, match=r"2 classes \(no, yes\) need a loss of classes.*the loss is mean_squared_error"
    ):
        gb.MLP([8, 1], loss="mean_squared_error").fit(frame, labels(frame), progress=False)
    model = gb.MLP([8, 1], loss="mean_squared_error")
    assert model.features is None  # a fit that fails leaves nothing behind
    with pytest.raises(ValueError, match="y has shape"):
        model.fit(frame, np.zeros(3), progress=False)
    assert model.features is None


# ---------------------------------------------------------------------- what a network makes of them


def test_a_network_takes_the_raw_table_everywhere(device: str):
    frame = table()
    y = labels(frame)
    model = trained(frame, y, device, standardize=True)
    X = model.features.matrix(frame)
    plain = model.twin(features=None, classes=None)
    indices = (y == "yes").astype(np.int64)
    np.testing.assert_array_equal(model.forward(frame), plain.forward(X))
    np.testing.assert_array_equal(model.predict_proba(frame), plain.predict_proba(X))
    np.testing.assert_array_equal(model.predict(frame), np.array(["no", "yes"])[plain.predict(X)])
    assert model.evaluate(frame, y) == plain.evaluate(X, indices)
    assert float(model.loss_and_gradients(frame, y)[0]) == float(plain.loss_and_gradients(X, indices)[0])
    np.testing.assert_array_equal(model.trace(frame, y).o, plain.trace(X, indices).o)
    assert gb.check_gradients(model, frame[:8], y[:8]).ok
    np.testing.assert_array_equal(
        np.concatenate([model.backend.to_numpy(o) for _, o in model.outputs_in_batches(frame)]), plain.forward(X)
    )
    np.testing.assert_array_equal(model.predictor(N)(frame), plain.predictor(N)(X))


def test_a_predictor_made_before_the_fit_follows():
    X = np.random.default_rng(0).normal(50, 9, (40, 3)).astype(np.float32)
    model = gb.MLP([3, 8, 2])
    predictor = model.predictor()
    model.fit(X, np.arange(40) % 2, standardize=True, progress=False)
    np.testing.assert_array_equal(predictor(X[:1]), model.forward(X[:1]))
    np.testing.assert_array_equal(predictor(X[0]), model.forward(X[:1]))


def test_training_on_a_table_is_training_on_its_inputs(device: str):
    frame = table()
    model = trained(frame, labels(frame), device, standardize=True, class_weight="balanced")
    X, y = model.features.matrix(frame), (labels(frame) == "yes").astype(np.int64)
    plain = gb.MLP([8, 16, 2], device=device, seed=1)
    weight = N / (2 * np.bincount(y))
    plain.fit(X, y, epochs=5, batch_size=16, progress=False, sample_weight=weight[y])
    np.testing.assert_array_equal(model.state_dict()["layers.1.weight"], plain.state_dict()["layers.1.weight"])


def test_files_copies_and_devices_keep_them(tmp_path: Path):
    import pickle

    frame = table()
    frame.loc[2, "age"] = np.nan
    model = trained(frame, labels(frame), standardize=True, missing="median", scale=2.0)
    model.save(tmp_path / "m.safetensors")
    for same in (gb.load(tmp_path / "m.safetensors"), pickle.loads(pickle.dumps(model)), model.to("reference")):
        assert same.features == model.features
        assert same.classes == ("no", "yes")
        np.testing.assert_array_equal(same.predict(frame), model.predict(frame))


def test_a_second_fit_keeps_the_first_ones_features():
    frame = table()
    model = trained(frame, labels(frame), standardize=True)
    first = model.features
    model.fit(table(1) * 1, labels(table(1)), epochs=1, progress=False)
    assert model.features is first
    with pytest.raises(ValueError, match="scale is asked for; the network keeps the features of its first fit"):
        model.fit(frame, labels(frame), scale=255, progress=False)
    with pytest.raises(
        ValueError, match=r"classes is \['yes', 'no'\]; the network has \['no', 'yes'\] from its first fit"
    ):
        model.fit(frame, labels(frame), classes=["yes", "no"], progress=False)
    with pytest.raises(ValueError, match=r"y of sample 1 is 'maybe', which is none of the classes \['no', 'yes'\]"):
        model.evaluate(frame, np.where(frame.age > 0, "maybe", "no"))


def test_a_run_resumes_with_the_raw_table(tmp_path: Path):
    frame, whole, parted = table(), gb.MLP([8, 16, 2], seed=1), gb.MLP([8, 16, 2], seed=1)
    y, options = labels(frame), {"standardize": True, "batch_size": 16, "progress": False}
    whole.fit(frame, y, epochs=6, **options)
    parted.fit(frame, y, epochs=3, checkpoint=tmp_path / "run", **options)
    run = gb.resume(tmp_path / "run")
    run.fit(frame, y, epochs=6, progress=False)
    assert gb.fingerprint(run.model) == gb.fingerprint(whole)
    assert run.model.features == whole.features


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_folded_gives_the_same_outputs(dtype: str):
    frame = table()
    frame.loc[2, "age"] = np.nan
    model = gb.MLP([8, 16, 2], dtype=dtype)
    model.fit(frame, labels(frame), epochs=5, standardize=True, missing="median", scale=3.0, progress=False)
    folded = model.folded()
    assert folded.features.mean is None
    assert folded.features.scale == 1
    # two roundings of x w of the size |x| / std, over 5 products
    bound = 16 * np.finfo(dtype).eps * model.features.growth_of_rounding()[0] * 10
    np.testing.assert_allclose(folded.forward(frame), model.forward(frame), atol=bound)


def test_folding_that_would_lose_the_digits_is_refused():
    X = np.random.default_rng(0).normal(2000, 0.5, (50, 2))
    model = gb.MLP([2, 4, 2])
    model.fit(X, np.arange(50) % 2, standardize=True, progress=False)
    with pytest.raises(ValueError, match=r"column [12] has a mean of .*e\+03 standard deviations.*use dtype='float64'"):
        model.folded()
    model.twin(dtype="float64").folded()


# ---------------------------------------------------------------------- labels


def test_labels_of_every_kind():
    X = np.random.default_rng(0).normal(size=(30, 3))
    for classes, y in ((None, ["a", "b", "c"] * 10), ([3, 1, 2], [1, 2, 3] * 10), (["x", "y", "z"], [0, 1, 2] * 10)):
        model = gb.MLP([3, 8, 3])
        model.fit(X, y, classes=classes, progress=False)
        named = np.array(sorted(set(y)) if classes is None else classes)
        np.testing.assert_array_equal(model.predict(X), named[model.forward(X).argmax(axis=1)])
        assert set(model.predict(X)) <= set(named)
    binary = gb.MLP([3, 1], loss="sigmoid_cross_entropy")
    binary.fit(X, pd.Series(["no", "yes"] * 15), progress=False)
    assert binary.predict(X).shape == (30,)
    assert set(binary.predict(X)) <= {"no", "yes"}


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["a"], "at least two different labels"), (["a", "a"], "different"), (["a", 1], "all text or all"), (3, "at least two"),
        ([float("nan"), 1.0], "different"), (["a", "b", "c"], "layer_sizes ends with 2: end with 3"),
    ],
)  # fmt: skip
def test_classes_that_cannot_be(classes: Any, message: str):
    with pytest.raises(ValueError, match=message):
        gb.MLP([3, 2]).fit(np.zeros((4, 3)), [0, 1, 0, 1], classes=classes, progress=False)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({"ja": 2}, r"class_weight names 'ja', which is none of the classes"), ("even", "give 'balanced', or a weight"),
        ({"a": -1}, "class_weight of 'a' is -1; it must be a number >= 0"), ({"a": 0, "b": 0}, "not all 0"),
    ],
)  # fmt: skip
def test_class_weights_that_cannot_be(weight: Any, message: str):
    with pytest.raises(ValueError, match=message):
        gb.MLP([3, 2]).fit(np.zeros((4, 3)), ["a", "b"] * 2, class_weight=weight, progress=False)
    with pytest.raises(ValueError, match="class_weight needs a loss of classes"):
        gb.MLP([3, 1], loss="mean_squared_error").fit(
            np.zeros((4, 3)), np.zeros(4), class_weight="balanced", progress=False
        )


def test_balanced_weights_are_scikit_learns():
    from sklearn.utils.class_weight import compute_sample_weight

    y = np.array([0, 0, 0, 2, 2, 0, 2, 0])
    loss = gb.losses.LOSSES["softmax_cross_entropy"]
    np.testing.assert_array_equal(weights_of("balanced", y, 8, None, 3, loss), compute_sample_weight("balanced", y))


def test_a_validation_split_takes_each_class_in_proportion_and_always_the_same_samples(device: str):
    X, y = np.random.default_rng(0).normal(size=(100, 3)), np.repeat([0, 1, 2], [60, 30, 10])
    seen: list[Any] = []
    for seed in (0, 1):
        model = gb.MLP([3, 4, 3], device=device, seed=seed)
        history = model.fit(X, y, epochs=2, validation_split=0.2, class_weight="balanced", progress=False)
        assert len(history["val_loss"]) == 2
        seen.append(gb.intake.Samples.given(X, y).split(0.2, model.architecture))
    (training, held), (_, again) = seen
    np.testing.assert_array_equal(held.X, again.X)
    assert np.bincount(held.y).tolist() == [12, 6, 2]
    assert len(training) == 80
    assert sorted(np.r_[training.X[:, 0], held.X[:, 0]]) == sorted(X[:, 0])
    with pytest.raises(ValueError, match="validation_data and validation_split are both given"):
        model.fit(X, y, validation_split=0.2, validation_data=(X, y), progress=False)
    with pytest.raises(ValueError, match=r"validation_split is 1; it must be in \(0, 1\)"):
        model.fit(X, y, validation_split=1, progress=False)


@pytest.mark.parametrize(
    ("loss", "metrics"),
    [("softmax_cross_entropy", ["f1", "ROC_AUC", "log_loss"]), ("mean_squared_error", ["mae", "rmse"])],
)
def test_metrics_are_columns_of_the_history(device: str, tmp_path: Path, loss: str, metrics: list[str]):
    rng = np.random.default_rng(0)
    X, classes = rng.normal(size=(90, 3)), loss.startswith("soft")
    y = np.arange(90) % 3 if classes else rng.normal(size=(90, 3))
    options = {"metrics": metrics, "validation_data": (X[60:], y[60:]), "progress": False}
    model = gb.MLP([3, 8, 3], loss=loss, device=device)
    history = model.fit(X[:60], y[:60], epochs=3, checkpoint=tmp_path, **options)
    overall = gb.score(model, X[60:], y[60:]).overall
    for name in map(str.lower, metrics):
        assert len(history[f"val_{name}"]) == 3
        assert history[f"val_{name}"][-1] == pytest.approx(overall[name])
    more = gb.resume(tmp_path).fit(X[:60], y[:60], validation_data=(X[60:], y[60:]), epochs=5, progress=False)
    assert len(more[f"val_{metrics[0]}"]) == 5
    with pytest.raises(ValueError, match="metrics has 'foo'; choose from"):
        model.fit(X, y, metrics=["foo"], progress=False)
    with pytest.raises(ValueError, match="metrics are of validation data; give validation_data or validation_split"):
        model.fit(X, y, metrics=metrics, progress=False)


def test_options_of_other_libraries_are_answered():
    with pytest.raises(
        TypeError, match=r"fit takes no option 'lr' \(the rate is the optimizer's: optimizer=gb.Adam\(1e-3\)\)"
    ):
        gb.MLP([3, 2]).fit(np.zeros((4, 3)), [0, 1, 0, 1], lr=0.1)


@given(st.lists(st.text(max_size=5), min_size=2, max_size=6, unique=True), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_labels_survive_both_ways(classes: list[str], seed: int):
    at = np.random.default_rng(seed).integers(0, len(classes), 20)
    y = np.empty(20, object)
    y[:] = [classes[i] for i in at]
    np.testing.assert_array_equal(indices_of(y, check_classes(classes)), at)


# ---------------------------------------------------------------------- in files

NUMBER = st.floats(-1e6, 1e6)


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_features_survive_json(data: Any):
    import json

    kinds = data.draw(
        st.lists(
            st.one_of(st.none(), st.lists(st.text(max_size=4), min_size=1, max_size=3, unique=True)),
            min_size=1,
            max_size=5,
        )
    )
    numbers = sum(kind is None for kind in kinds)
    features = Features(
        tuple(None if kind is None else tuple(kind) for kind in kinds),
        data.draw(st.none() | st.lists(st.text(max_size=4), min_size=len(kinds), max_size=len(kinds), unique=True).map(tuple)),
        data.draw(st.floats(1e-3, 1e3)),
        data.draw(st.none() | st.tuples(*(NUMBER if kind is None else st.sampled_from(kind) for kind in kinds))),
        *data.draw(st.just((None, None)) | st.tuples(st.tuples(*[NUMBER] * numbers), st.tuples(*[st.floats(1e-3, 1e3)] * numbers))),
    )  # fmt: skip
    assert Features.from_json(json.loads(json.dumps(features.to_json()))) == features


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("fill"), "they must be a dictionary of"),
        (lambda d: d.update(names=["a"]), "features have 1 names; 2 are needed"),
        (lambda d: d.update(std=[0.0]), "std of features is not above 0"), (lambda d: d.update(mean=[1e999]), "finite"),
        (lambda d: d.update(std=None), "mean or std, but not both"), (lambda d: d.update(scale="2"), "scale"),
        (lambda d: d.update(categories=[None, [1, 2]]), "a category of the features"),
        (lambda d: d.update(categories=[None, ["a", "a"]]), "different texts"),
        (lambda d: d.update(fill=["x", "a"]), "which it cannot hold"),
        (lambda d: d.update(fill=[1.0, "z"]), "which it cannot hold"), (lambda d: d.update(names=["a", "a"]), "more than once"),
        (lambda d: d.update(mean=[True]), "wrong type"),
    ],
)  # fmt: skip
def test_a_damaged_description_is_an_error(change: Any, message: str):
    description = Features((None, ("a", "b")), ("x", "y"), 1.0, (0.0, "a"), (1.0,), (2.0,)).to_json()
    change(description)
    with pytest.raises(ValueError, match=message):
        Features.from_json(description)


def test_a_network_without_them_has_the_description_it_had():
    assert "features" not in Architecture((3, 2)).to_json()
    assert "classes" not in Architecture((3, 2)).to_json()


def test_a_frame_is_taken_by_rows_and_columns():
    frame = Frame(("a", "b", "c"), np.arange(8.0).reshape(4, 2), {1: np.array(["x", "y", None, "x"], object)})
    part = frame[1:3].take([1, 2])
    assert part.names == ("b", "c")
    assert part.texts[0].tolist() == ["y", None]
    np.testing.assert_array_equal(part.numbers, [[3.0], [5.0]])
