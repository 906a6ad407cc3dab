"""Compressed files that were made to do harm: refused in one line, before they take memory."""

from __future__ import annotations

import gzip
import io
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpubackprop import archives
from gpubackprop.csv_files import WIDEST, read_csv
from gpubackprop.csv_lines import CsvError
from gpubackprop.datasets import load_dataset

Y = np.arange(8) % 2


def npy(a: np.ndarray) -> bytes:
    """Return the bytes of an .npy file."""
    file = io.BytesIO()
    np.save(file, a)
    return file.getvalue()


def header(text: str, data: bytes = b"") -> bytes:
    """Return the bytes of an .npy file with any header."""
    content = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little") + content + data


def write(path: Path, X: bytes, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    """Write an .npz file with these bytes for X."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("X.npy", X)
        archive.writestr("y.npy", npy(Y))
    return path


def refused(path: Path, message: str) -> None:
    """Assert that a file is refused with one line that names it, without memory for what it promises."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message) as caught:
        load_dataset(path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700 << 10  # KiB


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (8, 1000000000000)}"), "X is incomplete: shape"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (-1, -8)}", bytes(64)), "X is incomplete: shape"),
        (header("{'descr': '<U0', 'fortran_order': False, 'shape': (8, 1000000000000)}"), "X is incomplete: shape"),
        (header("{'descr': '<V2000000000', 'fortran_order': False, 'shape': (8, 1)}"), "X is incomplete: shape"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (8, 2)}", bytes(100)), "X is incomplete: shape"),
        (header("{'descr': '|O', 'fortran_order': False, 'shape': (8, 2)}", b"cos\nsystem\n"), "holds Python objects"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': " + "(" * 5000 + "}"), "not a valid .npz file|cannot be parsed"),
        (header("{'descr': " + "-" * 9000 + "1, 'fortran_order': False, 'shape': ()}"), "not a valid .npz file|cannot be parsed"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (8, 2)" + " " * 20000 + "}"), "not a valid .npz file"),
        (header("__import__('os').abort()"), "not a valid .npz file"),
        (b"\x93NUMPY\x03\x00" + npy(np.zeros((8, 2)))[8:], "X has version"),
        (b"x,y\n1,2\n", "X in it is not an array of NumPy"),
        (b"", "X in it is not an array of NumPy"),
        (npy(np.zeros((8, 2), complex)), "the features are not numbers"),
        (npy(np.zeros(8, [("a", "f8")])), "the features have shape|the features are not numbers"),
    ],
)  # fmt: skip
def test_an_array_that_is_not_what_its_header_says(X: bytes, message: str, tmp_path: Path) -> None:
    refused(write(tmp_path / "a.npz", X), message)


def test_what_unpacks_to_too_much_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    zeros = bytes(archives.LEAST + 1)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(zeros, 1))
    refused(tmp_path / "a.csv.gz", "unpack to more than 268,435,456; if that is right, unpack the file first")
    write(tmp_path / "a.npz", zeros)
    refused(tmp_path / "a.npz", "unpack to more than 268,435,456")


def test_what_shrinks_as_data_do_is_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", X=np.zeros((8, 100_000)), y=Y)
    assert load_dataset(tmp_path / "a.npz").X.shape == (6, 100_000)


def test_a_damaged_entry_of_an_archive_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", npy(np.arange(16.0).reshape(8, 2)), zipfile.ZIP_STORED)
    whole = path.read_bytes()
    place = whole.index(np.float64(5).tobytes())
    path.write_bytes(whole[:place] + b"\1" + whole[place + 1 :])
    refused(path, "truncated or not a valid .npz file .*CRC")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("X.npy", npy(np.zeros((8, 2))))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("X.npy", npy(np.ones((8, 2))))
    refused(path, "it holds X more than once")


def test_pipes_devices_and_links_that_lead_nowhere_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for a writer
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for name in (str(tmp_path / "pipe"), str(tmp_path / "circle"), "/dev/zero", "a\0b"):
        with pytest.raises(FileNotFoundError, match="no file"):
            load_dataset(name)


def test_the_command_line_says_it_in_one_line(tmp_path: Path) -> None:
    write(tmp_path / "a.npz", header("{'descr': '<f8', 'fortran_order': False, 'shape': (8, 1000000000000)}"))
    command = [sys.executable, "-m", "gpubackprop", "train", "--data", str(tmp_path / "a.npz")]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2
    assert len(found.stderr.splitlines()) == 1
    assert "X is incomplete" in found.stderr


def test_long_digits_are_looked_at_in_linear_time() -> None:
    """A quadratic search would take minutes over the first, hours over the second; the test's own limit is the runner's."""
    digits = b"1" * 1_000_000
    cases: dict[bytes, Any] = {
        b"1,0\n2,1\n%bx,1\n" % digits: "is not a number",
        b"%b,%b\n1,2\n3,4\n" % (digits, digits): "is not a finite number",
    }
    for content, message in cases.items():
        with pytest.raises(CsvError, match=message):
            read_csv(content, classification=True)


def test_a_row_of_too_many_columns_is_refused() -> None:
    with pytest.raises(CsvError, match="row 1 has 100,001 columns; 100,000 can be read"):
        read_csv(b"1," * WIDEST + b"1\n" + b"1,", classification=True)
