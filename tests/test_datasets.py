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
        ("a.npz", b"PK\x03\x04 cut off", "truncated or of another format"),
        ("a.csv", b"", "it is empty"),
        ("a.csv", b"1,2\n3\n", "row 2 has 1 columns, the first has 2"),
        ("a.csv", b"1,2,0\n3,x,1\n", "could not convert"),
        ("a.csv", b"1,0.5\n2,1\n", "not classes"),
        ("a.bin", b"abc\x00def", "neither .npz nor IDX"),
        ("a.gz", b"\x1f\x8b\x08 cut", "truncated or of another format"),
        (
            "x-images-idx3-ubyte",
            b"\0\0\x08\x03\0\0\0\x05\0\0\0\x02\0\0\0\x02abc",
            "promises 20 bytes of data, there are 3",
        ),
        ("x-images-idx3-ubyte", b"\0\0\x08\x03\0\0", "truncated or of another format"),
        ("values", b"\0\0\x08\x01\0\0\0\x01a", "'images' in its name"),
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
    with pytest.raises(ValueError, match="it holds features"):
        load_dataset(str(tmp_path / "a.npz"))


def test_features_and_targets_of_different_length_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", X=np.zeros((3, 2)), y=np.zeros(4, int))
    with pytest.raises(ValueError, match="3 samples and 4 targets"):
        load_dataset(str(tmp_path / "a.npz"))
