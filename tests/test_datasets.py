"""Data from files: every format, and every way a file can be wrong."""

import gzip
import struct

import numpy as np
import pytest

from gpubackprop.datasets import load_dataset


def idx(array: np.ndarray) -> bytes:
    kind = {np.dtype(np.uint8): 8, np.dtype(np.float32): 13}[array.dtype]
    header = struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (20, 4, 4), dtype=np.uint8), rng.integers(0, 3, 20, dtype=np.uint8)


def test_digits_are_1797_samples_of_ten_classes():
    d = load_dataset("digits")
    assert d.X.shape == (1438, 64)
    assert d.X_test.shape == (359, 64)
    assert set(np.unique(d.y)) == set(range(10))
    assert d.X.min() == 0
    assert d.X.max() == 1


def test_the_split_depends_on_the_seed_alone():
    a, b, c = load_dataset("digits", seed=1), load_dataset("digits", seed=1), load_dataset("digits", seed=2)
    np.testing.assert_array_equal(a.X, b.X)
    assert not np.array_equal(a.X, c.X)


def test_each_class_is_divided_in_proportion(tmp_path):
    rng = np.random.default_rng(0)
    y = rng.permutation(np.repeat([0, 1, 2], [90, 9, 1]))
    np.savez(tmp_path / "a.npz", X=np.arange(100.0)[:, None], y=y)
    for seed in range(20):
        d = load_dataset(tmp_path / "a.npz", validation_fraction=0.1, seed=seed)
        counts = [np.bincount(part, minlength=3).tolist() for part in (d.y, d.y_validation, d.y_test)]
        assert counts == [[65, 6, 1], [7, 1, 0], [18, 2, 0]]  # the only sample of a class is trained on
        rows = np.concatenate([d.X, d.X_validation, d.X_test])[:, 0]
        np.testing.assert_array_equal(np.sort(rows), np.arange(100))
        for X, part in ((d.X, d.y), (d.X_validation, d.y_validation), (d.X_test, d.y_test)):
            np.testing.assert_array_equal(part, y[X[:, 0].astype(int)])
        np.testing.assert_array_equal(load_dataset(tmp_path / "a.npz", seed=seed).X_test, d.X_test)


@pytest.mark.parametrize("n", range(2, 12))
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.9])
def test_every_part_of_a_small_set_has_a_sample_or_it_is_an_error(tmp_path, n, fraction):
    np.savez(tmp_path / "a.npz", X=np.arange(float(n))[:, None], y=np.arange(n) % 2)
    if n == 2 and fraction:
        with pytest.raises(ValueError, match=r"a\.npz.* it has 2 samples; at least 3 are needed"):
            load_dataset(tmp_path / "a.npz", validation_fraction=fraction)
        return
    d = load_dataset(tmp_path / "a.npz", validation_fraction=fraction)
    assert min(len(d.X), len(d.X_test)) > 0
    assert (len(d.X_validation) > 0) == (fraction > 0)
    assert len(d.X) + len(d.X_validation) + len(d.X_test) == n


def test_a_test_set_of_its_own_is_kept(tmp_path):
    y = np.arange(20) % 2
    np.savez(tmp_path / "a.npz", X=np.arange(20.0)[:, None], y=y)
    np.savez(tmp_path / "t.npz", X=np.arange(5.0)[:, None] + 50, y=y[:5])
    np.savez(tmp_path / "both.npz", x_train=np.ones((20, 1)), y_train=y, x_test=np.ones((5, 1)), y_test=y[:5])
    d = load_dataset(tmp_path / "a.npz", test=tmp_path / "t.npz", validation_fraction=0.2)
    assert (len(d.X), len(d.X_validation)) == (16, 4)
    np.testing.assert_array_equal(d.X_test[:, 0], np.arange(5) + 50)
    assert len(load_dataset(tmp_path / "both.npz", validation_fraction=0.2).X_validation) == 4
    for source, test, named in (("a", "both", "both"), ("both", "t", "both")):
        with pytest.raises(ValueError, match=rf"{named}\.npz.*: it holds a training set and a test set"):
            load_dataset(tmp_path / f"{source}.npz", test=tmp_path / f"{test}.npz")
    with pytest.raises(FileNotFoundError, match=r"--test takes a \.npz"):
        load_dataset(tmp_path / "a.npz", test=tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("y", "classification"),
    [
        (np.array(["b", "a"] * 5), True),
        (np.arange(10) % 2, True),
        (np.array([1.0, 2.0] * 5), True),
        (np.arange(100) % 10, True),
        (np.arange(300) % 26 + 1, True),
        (np.arange(10), False),  # one sample of each
        (np.arange(3000) % 60 + 18, False),  # such as ages
        (np.array([0.5, 1.0] * 5), False),
        (np.eye(3)[np.arange(30) % 3], True),
        (np.random.default_rng(0).normal(size=(30, 2)), False),
    ],
)
def test_classes_are_recognised(tmp_path, y, classification):
    np.savez(tmp_path / "a.npz", X=np.zeros((len(y), 2)), y=y)
    d = load_dataset(tmp_path / "a.npz", classification=None)
    assert d.classification == classification
    assert d.recognised
    assert not load_dataset(tmp_path / "a.npz", classification=classification).recognised


def test_the_shape_of_an_image_is_known(tmp_path, images):
    X, y = images
    for given, shape in ((X, (4, 4)), (np.repeat(X, 4, axis=2).reshape(20, 64), (8, 8)), (X / 255.0, None)):
        np.savez(tmp_path / "a.npz", X=given, y=y)
        assert load_dataset(tmp_path / "a.npz").image_shape == shape
    assert load_dataset("digits").image_shape == (8, 8)


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files_are_read_with_their_labels_and_test_set(tmp_path, images, compress):
    X, y = images
    suffix, pack = (".gz", gzip.compress) if compress else ("", bytes)
    for part, rows in (("train", slice(None, 12)), ("t10k", slice(12, None))):
        (tmp_path / f"{part}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(X[rows])))
        (tmp_path / f"{part}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(y[rows])))
    d = load_dataset(str(tmp_path / f"train-images-idx3-ubyte{suffix}"))
    np.testing.assert_allclose(d.X, X[:12].reshape(12, 16) / 255)
    np.testing.assert_array_equal(d.y, y[:12])
    np.testing.assert_array_equal(d.y_test, y[12:])


def test_npz_files_with_and_without_a_test_set(tmp_path, images):
    X, y = images
    np.savez(tmp_path / "a.npz", X=X / 255.0, y=y)
    assert len(load_dataset(str(tmp_path / "a.npz")).X) == 16
    np.savez_compressed(tmp_path / "b.npz", x_train=X[:15], y_train=y[:15], x_test=X[15:], y_test=y[15:])
    d = load_dataset(str(tmp_path / "b.npz"))
    assert d.X.shape == (15, 16)
    np.testing.assert_array_equal(d.y_test, y[15:])


@pytest.mark.parametrize("header", ["", "width,length,kind\n"])
def test_csv_with_names_of_classes(tmp_path, header):
    path = tmp_path / "flowers.csv.gz"
    rows = [f"{i}.5,{-i},{'rose' if i % 2 else 'iris'}" for i in range(10)]
    path.write_bytes(gzip.compress((header + "\n".join(rows)).encode()))
    d = load_dataset(str(path))
    assert d.classes == ["iris", "rose"]
    assert d.X.shape == (8, 2)
    X, y = np.concatenate([d.X, d.X_test]), np.concatenate([d.y, d.y_test])
    np.testing.assert_array_equal((X[:, 0] - 0.5).astype(int) % 2, y)


def test_csv_of_a_regression_keeps_real_targets(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("\n".join(f"{i},{i / 3}" for i in range(6)))
    d = load_dataset(str(path), classification=False)
    assert d.y.dtype == np.float64
    assert d.y.shape == (5, 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npz", b"PK\x03\x04 cut off", "truncated or not a valid .npz file"),
        ("a.csv", b"", "it is empty"),
        ("a.csv", b"1,2\n3\n", "row 2 has 1 column, the first has 2"),
        ("a.csv", b"1,0.5\n2,1\n", r"not classes, but real numbers such as 0\.5; .*--loss mean_squared_error"),
        ("a.csv", b"1,0\n2,0\n", r"of one class only \(0\)"),
        ("a.csv", b"PKs,y\n1,0\n2,0\n", r"of one class only \(0\)"),
        ("a.csv", b"PKs,y\n", "it has a header and no other row"),
        ("a.bin", b"abc\x00def", "neither .npz nor IDX"),
        ("a.gz", b"\x1f\x8b\x08 cut", "truncated or not a valid gzip file"),
        (
            "x-images-idx3-ubyte",
            b"\0\0\x08\x03\0\0\0\x05\0\0\0\x02\0\0\0\x02abc",
            "promises 20 bytes of data, there are 3",
        ),
        ("x-images-idx3-ubyte", b"\0\0\x08\x03\0\0", "truncated in its header"),
        ("values", b"\0\0\x08\x01\0\0\0\x01a", "its name lacks 'images'"),
    ],
)
def test_a_wrong_file_is_an_error_of_one_line_that_names_it(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_dataset(str(tmp_path / name))
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"no file 'nowhere\.csv'; --data takes 'digits' or"):
        load_dataset("nowhere.csv")


def test_an_npz_of_other_names_says_what_it_holds(tmp_path):
    np.savez(tmp_path / "a.npz", features=np.zeros(3))
    with pytest.raises(ValueError, match="it holds 'features'"):
        load_dataset(str(tmp_path / "a.npz"))


def test_features_and_targets_of_different_length_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", X=np.zeros((3, 2)), y=np.zeros(4, int))
    with pytest.raises(ValueError, match="there are 3 samples and 4 targets"):
        load_dataset(str(tmp_path / "a.npz"))


def test_bytes_are_pixels_in_the_features_and_never_in_the_targets(tmp_path, rng):
    path = tmp_path / "a.npz"
    X = rng.normal(size=(30, 4))
    for y, classification in (
        (rng.integers(0, 2, (30, 3)).astype(np.uint8), True),
        (np.eye(3, dtype=np.uint8)[np.arange(30) % 3], True),
        (rng.integers(0, 200, (30, 2)).astype(np.uint8), False),
        (rng.integers(0, 200, 30).astype(np.uint8), False),
    ):
        np.savez(path, X=X, y=y)
        d = load_dataset(str(path), classification=classification)
        assert sorted(map(tuple, np.concatenate([d.y, d.y_test]).reshape(30, -1))) == sorted(
            map(tuple, y.reshape(30, -1))
        )
    flags = rng.integers(0, 2, (30, 4)).astype(np.uint8)  # zeros and ones in a table are no pixels
    np.savez(path, X=flags, y=np.arange(30) % 2)
    assert load_dataset(str(path)).X.max() == 1


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": np.zeros(50), "y": np.arange(50) % 2}, r"the features have shape \(50,\); they must be \(samples, features\)"),
        ({"X": np.zeros((4, 0)), "y": np.arange(4) % 2}, r"the features have shape \(4, 0\)"),
        ({"X": np.array([["a"], ["b"]]), "y": [0, 1]}, "the features are not numbers"),
        ({"X": np.zeros((2, 1), complex), "y": [0, 1]}, "the features are not numbers"),
        ({"X": np.array([[None], [1]], object), "y": [0, 1]}, "Python objects, which are not loaded"),
        ({"X": np.array([[1.0], [np.nan]]), "y": [0, 1]}, r"the features hold NaN or infinity \(1 of 2 values\), first in sample"),
        ({"X": np.zeros((2, 1)), "y": [0, np.inf]}, "the targets hold NaN or infinity"),
        ({"X": np.zeros((2, 1)), "y": 1}, r"the targets have shape \(\)"),
        ({"X": np.zeros((2, 1)), "y": np.zeros((2, 1), "M8[s]")}, "the targets are not numbers"),
        ({"x_train": np.zeros((2, 2)), "y_train": [0, 1], "x_test": np.zeros((1, 3)), "y_test": [0]}, "different shapes"),
    ],
)  # fmt: skip
def test_arrays_that_are_no_features_or_targets(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        load_dataset(str(tmp_path / "a.npz"))
    assert "a.npz" in str(error.value)


def test_names_of_classes_in_an_npz_file(tmp_path):
    for y in (np.array(["b", "a", "b", "a"]), np.array([b"b", b"a", b"b", b"a"])):
        np.savez(tmp_path / "a.npz", X=np.arange(4.0)[:, None], y=y)
        d = load_dataset(str(tmp_path / "a.npz"))
        assert d.classes == ["a", "b"]
        assert "2 classes: a, b" in d.found


@pytest.mark.parametrize(
    ("images_file", "labels_file", "message"),
    [
        (lambda X, y: idx(y), lambda X, y: idx(X), "are the files swapped"),
        (lambda X, y: idx(X), lambda X, y: b"\0\5" + idx(y)[2:], "begins with 00 05 08 01"),
        (lambda X, y: idx(X), lambda X, y: b"\0\0\x0a" + idx(y)[3:], "begins with 00 00 0a 01"),
        (lambda X, y: idx(X), lambda X, y: b"\0\0\x08\0\1", "begins with 00 00 08 00"),
        (lambda X, y: idx(X), lambda X, y: idx(y)[:-1], "promises 20 bytes of data, there are 19"),
        (lambda X, y: idx(X), lambda X, y: idx(y) + b"\0", "promises 20 bytes of data, there are 21"),
        (lambda X, y: idx(X), lambda X, y: idx(y[:-1]), "there are 20 samples and 19 targets"),
        (lambda X, y: idx(X), lambda X, y: b"", "begins with nothing"),
        (lambda X, y: idx(X), None, "there is no file of labels 'train-labels-idx1-ubyte' in its folder"),
    ],
)
def test_idx_files_that_do_not_belong_together(tmp_path, images, images_file, labels_file, message):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(images_file(*images))
    if labels_file is not None:
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels_file(*images))
    with pytest.raises(ValueError, match=message) as error:
        load_dataset(str(tmp_path / "train-images-idx3-ubyte"))
    assert "train-images-idx3-ubyte" in str(error.value)


def test_a_regression_is_no_classification(tmp_path, rng):
    path = tmp_path / "a.npz"
    for y, message in (
        (
            25 + 3 * (np.arange(400) % 200),
            "200 different numbers in 400 samples, which are hardly classes",
        ),  # 2 of each
        (2 * (np.arange(4000) % 150), "150 different numbers in 4000 samples"),  # many of each, but with gaps
        (rng.normal(size=400), "real numbers such as"),
    ):
        np.savez(path, X=np.zeros((len(y), 2)), y=y)
        with pytest.raises(ValueError, match=message + ".*--loss mean_squared_error"):
            load_dataset(str(path))
        assert len(load_dataset(str(path), classification=False).y) == 0.8 * len(y)
    for y in (np.arange(40) % 10, np.arange(1000) % 200):  # a few of each class, many classes
        np.savez(path, X=np.zeros((len(y), 2)), y=y)
        assert load_dataset(str(path)).classes is None


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load_dataset(str(tmp_path))


def test_a_damaged_binary_file_is_read_whole_or_refused_with_its_name(tmp_path, images):
    read_whole, refused = 0, []
    X, y = images
    np.savez(tmp_path / "whole.npz", X=X, y=y)
    whole = {"a.npz": (tmp_path / "whole.npz").read_bytes(), "a-images-idx3": idx(X), "a-labels-idx1": idx(y)}
    for seed in range(60):
        random = np.random.default_rng(seed)
        for name, content in whole.items():
            damaged = bytearray(content)
            for _ in range(random.integers(0, 3)):
                i = int(random.integers(0, 200 if name == "a.npz" else 16))
                damaged[i : i + random.integers(0, 3)] = random.bytes(random.integers(0, 3))
            (tmp_path / name).write_bytes(damaged[: random.integers(0, len(damaged))] if seed % 10 == 0 else damaged)
        for name in ("a.npz", "a-images-idx3"):
            try:
                d = load_dataset(str(tmp_path / name))
            except ValueError as error:
                refused.append((name, str(error)))
            else:
                assert len(d.X) + len(d.X_test) == len(d.y) + len(d.y_test) == 20
                read_whole += 1
    assert min(read_whole, len(refused)) > 15
    assert all(name in message and "\n" not in message for name, message in refused)


def test_longer_numbers_that_float64_has_none_for_are_refused(tmp_path):
    X = np.ones((8, 2), np.longdouble)
    X[5, 1] = np.longdouble("1e400")
    if not np.isfinite(X).all():
        pytest.skip("long double is float64 here")
    np.savez(tmp_path / "a.npz", X=X, y=np.arange(8) % 2)
    with pytest.raises(ValueError, match=r"features hold NaN or infinity .*first in sample 6"):
        load_dataset(tmp_path / "a.npz")
