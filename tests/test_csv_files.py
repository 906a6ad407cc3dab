"""CSV files: what a header, a delimiter and a number are, and a line for everything else; rows in are rows out."""

import csv
import random
import re
import subprocess
import sys

import numpy as np
import pytest

from gpubackprop.csv_files import read_csv
from gpubackprop.csv_lines import CsvError

X = [[1.5, 2.0], [3.5, 4.0], [5.5, 6.0], [7.5, 8.0]]
LINES = ["a,b,c", "1.5,2,0", "3.5,4,1", "5.5,6,0", "7.5,8,1"]


def read(text, *, classification=True, **options):
    content = text if isinstance(text, bytes) else text.encode()
    return read_csv(content, classification=classification, **options)


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(LINES) + "\n",
        "\r\n".join(LINES) + "\r\n",
        "\r".join(LINES),
        "\n".join(LINES),
        "\n\n".join(LINES) + "\n\n\n",
        "\n \t \n".join(LINES) + "\n  ",
        "\n".join(",".join(f'"{cell}"' for cell in line.split(",")) for line in LINES),
        "\n".join(", ".join(f'"{cell}"' for cell in line.split(",")) for line in LINES),
        "\n".join(LINES).replace(",", " , "),
        "\n".join(LINES).replace(",", ";"),
        "\n".join(LINES).replace(",", ";").replace(".", ","),
        "\n".join(LINES).replace(",", "\t"),
        "\n".join(LINES).replace(",", "\t").replace(".", ",").encode("utf-16"),
        "\n".join(LINES).replace(",", "|"),
        "\ufeff" + "\n".join(LINES),
        "\ufeff" + "\r\n".join(LINES[1:]),
        "\n".join(LINES).encode("utf-16"),
        "\n".join(LINES).replace(".5,", ".50e0,").replace("1.", "+1.").replace("2,", "2.,"),
    ],
)
def test_one_table_written_in_many_ways(text):
    table = read(text)
    assert table.X.tolist() == X
    assert table.y.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("header", "body", "is_header"),
    [
        ("2019,2020,y", "3.2,4,1\n5,6,0", True),
        ("nan,b,y", "3.2,4,1\n5,6,0", True),
        ("1e3,b,label", "3.2,4,1\n5,6,0", True),
        ("a,b,2020", "3.2,4,1\n5,6,0", True),
        (",a,y", "0,4,1\n1,6,0", True),
        ("a,b,kind", "3.2,4,rose\n5,6,iris", True),
        ("age,y", "1,0\n2,1", True),
        ("5,6,rose", "3.2,4,rose\n5,6,iris", False),
        ("5,6,rose", "3.2,4,tulip\n5,6,iris", False),  # nothing is repeated: one sample of each class
        ("1,2,0", "3.2,4,1\n5,6,0", False),
        ("0,1", "1,2\n2,3", False),  # x, x + 1
        ("0,1,2", "3.2,4,1\n5,6,0", None),
        ("2019,2020,2021", "3.2,4,1\n5,6,0", None),
        ("2019,2020,kind", "3.2,4,rose\n5,6,rose", None),
        ("2015,2020,kind", "3,4,rose\n5,6,iris\n5,6,iris\n7,8,rose", None),
        ("5.1,3.5,tulip", "3,4,rose\n5,6,iris\n5,6,iris\n7,8,rose", False),
        ("2015,2020,2021", "3.2,4.5,1\n5.5,6.1,0\n5.1,6.2,1\n1.5,2.5,0", None),
        ("5,7,1", "3.2,4.5,1\n5.5,6.1,0\n5.1,6.2,1\n1.5,2.5,0", False),
        ("1,2,0", "3,4,1\n5,6,1", False),
        ("1,x,0", "3.2,4,1\n5,6,0", None),
        ("x,0", "3.2,1\n5,0", None),
    ],
)
def test_a_header_is_found_by_all_cells_of_the_first_row(header, body, is_header):
    text, rows = header + "\n" + body, len(body.splitlines())
    if is_header is None:
        with pytest.raises(CsvError, match=r"row 1 may be a header or a sample: .*--header or --no-header"):
            read(text)
        assert len(read(text, header=True).X) == rows
    else:
        table = read(text)
        assert len(table.X) == rows + (not is_header)
        assert ("a header in row 1" in table.found) == is_header


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("\n \n\n", "it is empty"),
        ("\ufeff\ufeff", "it is empty"),
        ("a,b,y\n", "it has a header and no other row"),
        ("a\n1\n2\n", "it has 1 column; at least one feature and 1 target column are needed, separated by"),
        ("a,b,y,\n1,2,0,\n3,4,1,\n", "row 2, column 4 is missing"),
        ("1 2 0\n3 4 1\n", "it has 1 column"),
        ("age,b,y\n1,2,0\n\n3,4,1\n,6,0\n", r"row 5, column 'age' is missing; fill it in"),
        ("age,b,y\n1,2,0\n3,NA,1\n", r"row 3, column 'b' is missing \('NA'\)"),
        ("age,b,y\n1,2,0\n3,nan,1\n", r"row 3, column 'b' is missing \('nan'\)"),
        ("age,b,y\n1,2,0\n3,4,\n", "row 3, column 'y' is missing"),
        ("age,b,y\n1,2,u\n3,4,u\n3,4,?\n", r"row 4, column 'y' is missing \('\?'\)"),
        ("age,age,y\n1,2,0\n3,,1\n", "row 3, column 2 is missing"),
        ("1,2,0\n3,-inf,1\n", "row 2, column 2 is '-inf', which is not a finite number"),
        ("1,2,0\n3,1e400,1\n", "row 2, column 2 is '1e400', which is not a finite number"),
        ("1,2,0\n3,x,1\n", "row 2, column 2 is 'x', which is not a number"),
        ("1,2,0\n3,0x1F,1\n", "'0x1F', which is not a number"),
        ("1,2,0\n3,1_000,1\n", "'1_000', which is not a number"),
        ('1,2,0\n3,"1,000",1\n', "'1,000', which is not a number"),
        ("1,2,0\n3,True,1\n", "'True', which is not a number"),
        ("1,2,0\n3,１,1\n", "'１', which is not a number"),
        ("1|2,5|0\n3|1.234|1\n", "commas and decimal points in one file: row 1, column 2 is '2,5', row 2, column 2 is '1.234'"),
        ("1,2,0\n3,4\n", "row 2 has 2 columns, the first has 3"),
        ("1,2,0\n\n3,4,5,6\n", "row 3 has 4 columns, the first has 3"),
        ('1,2,a\n3,4,"b\n5,6,a\n', "row 2 has a quotation mark that is not closed"),
        ('1,2,a\n3,a"b,"c\n5,6,a\n5,6,b\n', "row 2 has a quotation mark that is not closed"),
        (b"1,2,0\n3,\xe9,1\n", "row 2 is not UTF-8 .byte 0xe9.; save the file as UTF-8"),
        (b"1,2,0\n3,\0,1\n", "row 2 holds a NUL byte"),
        (b"\xff\xfe1", "it begins like UTF-16, but is not"),
        ("1,2,0\n1,2,u\n1,2,1\n", "number in some rows and text in others: row 1, column 3 is '0', row 2, column 3 is 'u'"),
        ("1,2,9007199254740993\n1,2,9007199254740992\n", "too large for a class label"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(text, message):
    with pytest.raises(CsvError, match=message) as error:
        read(text)
    assert "\n" not in str(error.value)


def test_a_header_after_blank_lines_is_named_by_its_row():
    assert "a header in row 3" in read("\n \na,b,y\n1,2,0\n3,4,1\n").found


def test_whole_numbers_above_decimals_may_be_names_in_a_regression_too():
    with pytest.raises(CsvError, match="row 1 may be a header or a sample"):
        read("2015,2020,2021\n3.2,4.5,1.5\n5.5,6.1,0.5\n", classification=False)
    with pytest.raises(CsvError, match="row 1 may be a header or a sample"):
        read("0,1,2\n3.2,4.5,1\n5.5,6.1,0\n", classification=False)
    assert len(read("2015,2020,2021\n3.2,4.5,1\n5.5,6.1,0\n", classification=False).X) == 3


def test_a_row_too_long_for_the_parser_is_named(monkeypatch):
    monkeypatch.setattr("gpubackprop.csv_lines.LONGEST", 1 << 21)
    with pytest.raises(CsvError, match="row 1 or later is longer than 2,097,152 bytes"):
        read(b"1," * (1 << 21))


def test_a_fault_in_a_later_block_is_named_by_its_row(monkeypatch):
    monkeypatch.setattr("gpubackprop.csv_lines.FIRST_BLOCK", 64)
    monkeypatch.setattr("gpubackprop.csv_lines.BLOCK", 64)
    rows = [f"{i},{i / 2},{i % 2}" for i in range(50)]
    table = read("a,b,y\r\n" + "\r\n".join(rows))
    np.testing.assert_array_equal(table.X, [[i, i / 2] for i in range(50)])
    np.testing.assert_array_equal(table.y, np.arange(50) % 2)
    table = read("a|b|y\n" + "\n".join(rows).replace(",", "|").replace(".", ","))
    np.testing.assert_array_equal(table.X, [[i, i / 2] for i in range(50)])
    rows[40] = "40,oops,1"
    with pytest.raises(CsvError, match="row 42, column 'b' is 'oops'"):
        read("a,b,y\r\n" + "\r\n".join(rows))
    rows[40] = "40,1"
    with pytest.raises(CsvError, match="row 42 has 2 columns"):
        read("a,b,y\r\n" + "\r\n".join(rows))
    rows[40] = "40,1,1"
    with pytest.raises(CsvError, match=r"points in one file: row 42, column 'b' is '1,5', row 2, column 'b' is '0\.0'"):
        read("a|b|y\n" + "\n".join(rows).replace(",", "|").replace("40|1|1", "40|1,5|1"))


def test_labels_may_be_text_and_hold_quotes_and_delimiters():
    table = read('1,2,"a, ""b"""\n3,4, c \n5,6,NA\n')
    assert table.y.tolist() == ['a, "b"', "c", "NA"]


def test_the_target_is_a_column_of_any_place():
    text = "kind,a,b\nu,1,2\nv,3,4\n"
    for target in ("kind", "1", 1):
        table = read(text, target=target, header=True)
        assert table.X.tolist() == [[1, 2], [3, 4]]
        assert table.y.tolist() == ["u", "v"]
    with pytest.raises(CsvError, match=r"target is 'c', which no column is called; row 1 holds 'kind', 'a', 'b'"):
        read(text, target="c")
    with pytest.raises(CsvError, match="row 1 may be a header or a sample: '1', '2', '0'"):
        read("1,2,0\n3,4,1\n", target="2")
    assert read("1,2,0\n3,4,1\n", target="2", header=False).y.tolist() == [2, 4]
    assert read("1,2,0\n3,4,1\n", target="0", header=True).y.tolist() == [1]
    with pytest.raises(CsvError, match="which 2 columns are called"):
        read("a,a,b\n1,2,3\n", target="a")


def test_a_regression_has_real_targets_in_its_last_columns():
    table = read("a,b,c\n1,2,3.5\n4,5,6.5\n", classification=False, targets=2)
    assert table.X.tolist() == [[1], [4]]
    assert table.y.tolist() == [[2, 3.5], [5, 6.5]]
    with pytest.raises(CsvError, match="row 3, column 'c' is 'x', which is not a number"):
        read("a,b,c\n1,2,3.5\n4,5,x\n", classification=False)


def test_digits_are_read_as_python_reads_them(rng):
    numbers = np.concatenate(
        [rng.normal(size=600) * 10.0 ** rng.integers(-300, 300, 600), [5e-324, 1.7976931348623157e308]]
    )
    text = "\n".join(f"{a!r},{b!r},{i % 2}" for i, (a, b) in enumerate(numbers.reshape(-1, 2).tolist()))
    np.testing.assert_array_equal(read(text).X.ravel(), numbers)


def test_pyarrow_is_imported_only_where_a_csv_file_is_read():
    code = "import sys, gpubackprop, gpubackprop.datasets, gpubackprop.cli; sys.exit('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


SEPARATORS = {"tabs": "\t", "semicolons": ";", "bars": "|", "commas": ","}
PIECES = [*',;\t|" \n\r\0\xa0é.-_', '""', "\r\n", "\ufeff", "e9", "0x", "nan", "inf", "a", "\n \n"]


def damaged(random):
    """Return a small CSV file with a few accidents."""
    separator, newline = random.choice(",;\t|"), random.choice(["\n", "\r\n", "\r"])
    kinds = random.choice([["0", "1"], ["rose", "iris"]])
    rows = [[f"{random.uniform(-9, 9):.3g}", f"{i}", random.choice(kinds)] for i in range(random.randint(1, 9))]
    header = [["a", "b", "y"]] * random.randint(0, 1)
    content = newline.join(separator.join(row) for row in header + rows).encode()
    for _ in range(random.randint(0, 3)):
        i = random.randint(0, len(content))
        piece = random.choice([random.choice(PIECES).encode(), random.randbytes(1), content[i : i + 20]])
        content = content[:i] + piece + content[i + random.choice([0, 0, 1, 5]) :]
    return content


def read_plainly(content, separator, header):
    """Return the features as Python's csv module reads them, line by line."""
    text = content.removeprefix(b"\xef\xbb\xbf").decode()
    lines = [line for line in re.split("\r\n|\r|\n", text) if line.strip(" \t\v\f")]
    blanks = re.compile(rf'(^|{re.escape(separator)})[ ]+(?=")')  # before an opening quotation mark
    rows = [next(csv.reader([blanks.sub(r"\1", line)], delimiter=separator)) for line in lines]
    return [[float(cell.strip().replace(",", ".")) for cell in row[:-1]] for row in rows[header:]]


def test_a_damaged_file_is_read_as_it_stands_or_refused():
    read_whole, refused = 0, []
    for seed in range(400):
        content = damaged(random.Random(seed))
        try:
            table = read(content)
        except CsvError as error:
            refused.append(str(error))
            continue
        separator = SEPARATORS[re.search(r"separated by (\w+)", table.found).group(1)]
        assert table.X.tolist() == read_plainly(content, separator, "a header in row 1" in table.found), content
        read_whole += 1
    assert min(read_whole, len(refused)) > 50
    assert not any("\n" in message for message in refused)


def test_a_target_that_may_be_a_number_or_a_label_makes_no_header_by_itself():
    for text, target in (("1.5,2,0\n3,4,1\n5,6,0\n", "0"), ("1,2,a\n3,4,b\n5,6,a\n", "a"), ("1.5,2,0\n3,4,1\n", 1.5)):
        with pytest.raises(CsvError, match="row 1 may be a header or a sample"):
            read(text, target=target)
