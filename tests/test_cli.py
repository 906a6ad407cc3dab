"""The command line, run as a user runs it; mistakes are one line and exit status 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.activations import ACTIVATIONS
from gpubackprop.datasets import load_dataset
from gpubackprop.losses import LOSSES
from gpubackprop.optimizers import OPTIMIZERS
from gpubackprop.schedules import SCHEDULES
from gpubackprop.training.checkpoint import load_training


def test_train_on_digits_reaches_97_percent_and_writes_its_results(run, tmp_path):
    status, out, _ = run("train", "--epochs", "40", "--out", str(tmp_path / "run"))
    assert status == 0
    folder = tmp_path / "run"
    assert (
        out.splitlines()[-1] == f"next: gpubackprop evaluate {folder} digits, or gpubackprop predict {folder} NEW.csv"
    )
    accuracy = float(out.split("test accuracy: ")[1].split()[0])
    assert accuracy >= 0.97
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert len(history["loss"]) == 40
    assert sum(json.loads((tmp_path / "run" / "timing.json").read_text())["seconds"]) < 10
    model = gb.load(tmp_path / "run" / "model.safetensors")
    assert model.layer_sizes == (64, 64, 32, 10)
    assert (tmp_path / "run" / "learning_curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_resumed_training_ends_with_the_bits_of_an_uninterrupted_one(run, tmp_path):
    options = [
        "--layers",
        "64-8-10",
        "--optimizer",
        "adam",
        "--schedule",
        "linear_warmup",
        "--dropout",
        "0.2",
        "--quiet",
    ]
    # the schedule is fixed by the first call: here both have the warm-up of 4 epochs
    assert run("train", *options, "--epochs", "4", "--out", str(tmp_path / "a"))[0] == 0
    model, history = load_training(tmp_path / "a" / "checkpoint.safetensors")
    optimizer = model.optimizer_state.optimizer
    assert run("train", *options, "--epochs", "6", "--out", str(tmp_path / "a"), "--resume")[0] == 0
    resumed = gb.load(tmp_path / "a" / "model.safetensors")
    whole = gb.MLP([64, 8, 10], dropout=0.2)
    d = load_dataset("digits", validation_fraction=0.1)
    whole.fit(d.X, d.y, epochs=6, batch_size=32, optimizer=optimizer, progress=False)
    np.testing.assert_array_equal(resumed.parameters.flat, whole.parameters.flat)
    assert len(history["loss"]) == 4
    assert len(json.loads((tmp_path / "a" / "history.json").read_text())["loss"]) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "nowhere.csv"], "no file 'nowhere.csv'"),
        (["train", "--layers", "64-x-10"], "--layers is '64-x-10'"),
        (["train", "--layers", "63-10"], "begin with 64 and end with 10"),
        (["train", "--layers", "64-0-10"], "whole numbers >= 1"),
        (["train", "--activation", "rleu"], "did you mean 'relu'?"),
        (["train", "--loss", "mean_square"], "unknown loss 'mean_square' (did you mean 'mean_squared_error'?)"),
        (["train", "digits", "--data", "other.csv"], "DATA is 'digits' and --data is 'other.csv'; give one of them"),
        (["train", "--test", "nowhere.csv"], "test is an option of a file, which 'digits' is not"),
        (["train", "--validation", "1"], "validation_fraction is 1.0; it must be in [0, 1)"),
        (["train", "--validation", "0", "--patience", "3"], "--patience goes by the validation set"),
        (["train", "--split-seed", "-1"], "seed is -1"),
        (["train", "--optimizer", "adm"], "unknown optimizer 'adm'"),
        (["train", "--optimizer", "lbfgs", "--weight-decay", "0.1"], "lbfgs takes no weight_decay"),
        (["train", "--schedule", "cosin"], "unknown schedule 'cosin'"),
        (["train", "--device", "tpu"], "unknown device 'tpu'"),
        (["train", "--dtype", "float16"], "device 'cpu' computes in float32, float64; dtype is 'float16'"),
        (["train", "--learning-rate", "-1"], "learning_rate is -1.0; it must be a number > 0"),
        (["train", "--epochs", "0"], "epochs is 0; it must be a whole number >= 1"),
        (["train", "--batch-size", "0"], "batch_size is 0"),
        (["train", "--dropout", "1"], "dropout is 1.0; it must be in [0, 1)"),
        (["train", "--resume"], "needs the folder of the run: --resume FOLDER"),
        (["train", "--epochs", "ten"], "Invalid value for '--epochs'"),
        (["train", "--nonsense"], "No such option"),
        (["train", "--layers", ""], "--layers is ''"),
        (["train", "--seed", "-1"], "seed is -1; it must be a whole number in [0, 2^64)"),
        (["train", "--device", "cpu:1"], "unknown device 'cpu:1'; there is only one cpu"),
        (["train", "--layers", "64-9999999999999-10"], "not enough memory"),
        (["train", "--out", "/proc"], "--out is '/proc', which cannot be written to"),
        (["train", "--out", "/dev/null"], "--out is '/dev/null', which is a file"),
        (["train", "--data", "."], "'.' is a folder"),
        (["train", "--data", "\0"], r"no file '\x00'"),
        (["explain", "--seed", "-1"], "seed is -1"),
        (["explain", "--batch-size", "0"], "batch_size is 0"),
        (["explain", "--layers", "4"], "give at least two whole numbers"),
        (["explain", "--layers", "4-1", "--loss", "softmax_cross_entropy"], "needs at least 2 outputs"),
    ],
)
def test_a_mistake_is_named_without_a_traceback_and_exits_2(run, arguments, message):
    status, _, err = run(*arguments)
    assert status == 2
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1,2,0\n3,nan,1\n4,5,0\n", "d.csv': row 2, column 2 is missing ('nan')"),
        ("1,2,0\n3,inf,1\n4,5,0\n2,2,1\n", "d.csv': row 2, column 2 is 'inf', which is not a finite number"),
        ("1,2,0\n3,4,0\n4,5,0\n", "d.csv': all targets are of one class only"),
        (
            "1,2,0\n3,4,1\n",
            "it has 2 samples; at least 3 are needed, to train, validate and test; --validation 0",
        ),
        ("a,b,y\n1,2,0\n3,,1\n", "d.csv': row 3, column 'b' is missing"),
        ("1,2,0\n3,1e39,1\n4,5,0\n", "d.csv': X holds NaN or infinity"),  # in float32
    ],
)
def test_bad_values_in_the_data_are_named_and_nothing_is_written(run, tmp_path, rows, message):
    (tmp_path / "d.csv").write_text(rows)
    arguments = ["--data", str(tmp_path / "d.csv"), "--layers", "2-4-2", "--out", str(tmp_path / "out"), "--quiet"]
    status, _, err = run("train", *arguments)
    assert status == 2
    assert message in err
    assert list((tmp_path / "out").iterdir()) == []


def test_an_out_that_is_a_file_is_refused_before_training(run, tmp_path):
    (tmp_path / "f").write_text("")
    status, _, err = run("train", "--out", str(tmp_path / "f"))
    assert status == 2
    assert "name a folder" in err


def test_explain_prints_both_phases_in_order_and_checks_every_gradient(run):
    status, out, _ = run("explain", "--layers", "4-8-8-3", "--activation", "tanh,gelu")
    assert status == 0
    out = out[out.index("THE FORWARD PROPAGATION PHASE") :]
    order = [
        "h_1 = φ_1(z_1)",
        "h_2 = φ_2(z_2)",
        "loss = mean",
        "THE BACKWARD PROPAGATION PHASE",
        "do =",
        "dW_o =",
        "dh_2 =",
        "dW_1 =",
    ]
    positions = [out.index(text) for text in order]
    assert positions == sorted(positions)
    for name in ("do", "db_o", "dW_o", "dh_2", "δ_2", "db_2", "dW_2", "dh_1", "δ_1", "db_1", "dW_1"):
        line = next(i for i, text in enumerate(out.splitlines()) if f" {name} = " in text)
        assert "✓" in out.splitlines()[line + 1]
    assert max(map(len, out.splitlines())) <= 100


def test_regression_from_a_csv_file(run, tmp_path):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 3))
    y = X @ [1.0, -2.0, 0.5] + 0.3
    np.savetxt(tmp_path / "r.csv", np.column_stack([X, y]), delimiter=",")
    options = ["--loss", "mean_squared_error", "--layers", "3-16-1", "--activation", "tanh", "--epochs", "200"]
    status, out, _ = run("train", "--data", str(tmp_path / "r.csv"), *options, "--learning-rate", "0.01", "--quiet")
    assert status == 0
    assert float(out.split("test r2: ")[1].split()[0]) > 0.95


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (["rose", "iris"] * 10, "target 'y' is text, so this is a classification by softmax_cross_entropy"),
        ([0, 1, 2] * 10, "holds 3 different whole numbers in 30 samples, so this is a classification by softmax_cross_entropy; "
         "--loss mean_squared_error makes it a regression"),
        (range(30), "holds 30 different whole numbers in 30 samples, so this is a regression by mean_squared_error; "
         "--loss chooses another"),
        ([18 + i % 25 for i in range(150)], "holds 25 different whole numbers in 150 samples, so this is a regression by "
         "mean_squared_error; --loss softmax_cross_entropy takes them as classes"),
        ([0.5, 1, 2] * 10, "target 'y' holds real numbers such as 0.5, so this is a regression by mean_squared_error"),
    ],
)  # fmt: skip
def test_classification_or_regression_is_recognised_and_said(run, tmp_path, cells, said):
    path = tmp_path / "d.csv"
    path.write_text("a,y,b\n" + "".join(f"{i},{cell},{-i}\n" for i, cell in enumerate(cells)))
    status, out, _ = run("train", str(path), "--target", "y", "--epochs", "1", "--quiet")
    assert status == 0
    assert said in out
    chosen = said.split(" by ")[1].split(";")[0]
    status, again, _ = run("train", "--data", str(path), "--target", "y", "--loss", chosen, "--epochs", "1", "--quiet")
    assert status == 0
    assert "--loss" not in again
    assert again.splitlines()[2] == out.splitlines()[3]  # the same network on the same samples


def test_one_column_per_class_has_an_output_per_column(run, tmp_path):
    np.savez(tmp_path / "a.npz", X=np.ones((30, 2)), y=np.eye(3)[np.arange(30) % 3])
    status, out, _ = run("train", str(tmp_path / "a.npz"), "--epochs", "1", "--quiet", "--out", str(tmp_path / "run"))
    assert status == 0
    assert "the target has 3 columns, with a single 1 in each row, so this is a classification" in out
    assert "MLP(2-64-32-3, " in out


def test_early_stopping_goes_by_the_validation_set_and_the_test_set_is_measured_once(run, tmp_path):
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(60, 4)), np.arange(60) % 3
    np.savez(tmp_path / "train.npz", X=X, y=y)
    np.savez(tmp_path / "test.npz", X=X + 100, y=(y + 1) % 3)  # nothing can be learned of it
    options = ["--test", str(tmp_path / "test.npz"), "--epochs", "50", "--patience", "3", "--learning-rate", "0.01"]
    status, out, _ = run("train", str(tmp_path / "train.npz"), *options, "--out", str(tmp_path / "run"), "--quiet")
    assert status == 0
    assert "54 training, 6 validation and 60 test samples" in out
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    best = int(np.argmin(history["val_loss"])) + 1
    assert len(history["val_loss"]) == min(best + 3, 50)
    assert f"kept epoch {best}, whose validation loss {min(history['val_loss']):.4f} is the best" in out
    d = load_dataset(tmp_path / "train.npz", test=tmp_path / "test.npz", validation_fraction=0.1)
    model = gb.load(tmp_path / "run" / "model.safetensors")
    assert model.evaluate(d.X_validation, d.y_validation)["loss"] == pytest.approx(min(history["val_loss"]), rel=1e-4)
    assert f"test loss: {model.evaluate(X + 100, (y + 1) % 3)['loss']:.4f}" in out


def test_a_resumed_run_keeps_its_split_and_a_seed_does_not_move_it(run, tmp_path):
    out, options = tmp_path / "run", ["--epochs", "2", "--quiet", "--layers", "64-8-10"]
    assert run("train", "digits", *options, "--split-seed", "5", "--loss", "ce", "--out", str(out))[0] == 0
    status, said, _ = run("train", "--resume", str(out), "--epochs", "3", "--quiet", "--loss", "cross-entropy")
    assert status == 0
    assert "resuming after 2 of 3 epochs" in said
    status, _, err = run("train", "--resume", str(out), "--epochs", "4", "--split-seed", "6")
    assert status == 2
    assert "--split-seed is 6; the run in" in err
    losses = set()
    for arguments in (["--seed", "1"], ["--seed", "1", "--split-seed", "1"]):
        losses.add(run("train", *options, *arguments)[1].split("test loss: ")[1].split()[0])
    assert len(losses) == 2
    again = load_dataset("digits", seed=0), load_dataset("digits", seed=0)
    np.testing.assert_array_equal(again[0].X_test, again[1].X_test)


def test_version_and_a_short_help_of_every_command(run):
    assert run("--version")[:2] == (0, f"gpubackprop {gb.__version__}\n")
    for command in (
        [],
        ["train"],
        ["explain"],
        ["golden"],
        ["grade"],
        ["check"],
        ["doctor"],
        ["info"],
        ["bench", "show"],
    ):
        status, out, _ = run(*command, "-h")
        assert status == 0
        assert " ".join(["Usage: gpubackprop", *command]) in out


def test_the_help_lists_every_name_and_the_shell_completes_it(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = run("train", "--help")
    for registry in (ACTIVATIONS, LOSSES, OPTIMIZERS, SCHEDULES):
        assert all(name in out for name in registry)
    monkeypatch.setenv("_GPUBACKPROP_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "gpubackprop train --loss mean_")
    monkeypatch.setenv("COMP_CWORD", "3")
    assert run()[1].split() == ["mean_squared_error", "mean_absolute_error"]


def test_info_names_version_devices_and_what_is_missing(run):
    status, out, _ = run("info")
    assert status == 0
    assert [line.partition(":")[0] for line in out.splitlines()] == [
        "gpubackprop", "devices", "device='auto'", "CUDA", "bits on the CPU", "kernel cache",
    ]  # fmt: skip


def test_check_passes_on_the_cpu(run):
    status, out, _ = run("check", "--device", "cpu", "--layers", "5-7-3")
    assert status == 0
    assert "cpu: ok" in out


def test_python_m_gpubackprop_is_the_command_line():
    result = subprocess.run([sys.executable, "-m", "gpubackprop", "explain", "--layers", "2-2"], capture_output=True)
    assert result.returncode == 0
    assert b"THE BACKWARD PROPAGATION PHASE" in result.stdout


def test_targets_that_a_loss_does_not_take_are_named_with_the_file(run, tmp_path):
    (tmp_path / "d.csv").write_text("1,2,0\n3,4,1\n4,5,1\n")
    status, _, err = run("train", "--data", str(tmp_path / "d.csv"), "--loss", "hinge", "--quiet")
    assert status == 2
    assert "d.csv': y holds" in err


def test_what_was_found_in_a_file_is_printed(run, tmp_path):
    (tmp_path / "d.csv").write_text("kind;a;b\n" + "rose;1,5;2\niris;2;3\n" * 5)
    status, out, _ = run(
        "train", "--data", str(tmp_path / "d.csv"), "--target", "kind", "--layers", "2-2", "--epochs", "1", "--quiet"
    )
    assert status == 0
    assert out.splitlines()[0] == (
        "d.csv: 10 rows of 3 columns, separated by semicolons (with decimal commas), a header in row 1; "
        "target: column 'kind', 2 classes: iris, rose"
    )


def test_the_exit_status_is_ours_wherever_an_interruption_came(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nimport gpubackprop.cli\n\n\n"
        "def main():\n    try:\n        exec('raise KeyboardInterrupt')\n    except KeyboardInterrupt:\n        sys.exit(130)\n\n\n"
        "gpubackprop.cli.main = main\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "gpubackprop"], env=environment, check=False)
    assert done.returncode == 130


def test_explain_writes_a_page_and_shows_values_and_the_fused_step(run, tmp_path):
    page, document = tmp_path / "page.html", tmp_path / "page.tex"
    status, out, _ = run(
        "explain", "--layers", "2-2-1", "--loss", "mean_squared_error", "--activation", "tanh", "--batch-size", "3",
        "--values", "--fused", "--html", str(page), "--latex", str(document),
    )  # fmt: skip
    assert status == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert document.read_text(encoding="utf-8").endswith("\\end{document}\n")
    assert out.index("Phew!") < out.index("THE STEP AS IT RUNS") < out.index("dW_1 agrees with finite differences")
    assert "         X " in out
    assert max(map(len, out.splitlines())) <= max(100, len(f"wrote {document}"))


def test_one_output_is_a_regression_by_default(run, tmp_path):
    status, out, _ = run("explain", "--layers", "2-2-1", "--values")
    assert status == 0
    assert "ℓ(o,y) = mean of (o − y)²" in out
    assert "-0.0000 " not in out
    assert run("check", "--layers", "3-4-1", "--device", "cpu")[0] == 0
    assert run("golden", "--layers", "3-4-1", "--out", str(tmp_path / "t.npz"))[0] == 0
    assert json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))["problem"]["loss"] == "mean_squared_error"


def test_golden_writes_a_file_and_grade_names_the_first_wrong_array_and_the_cause(run, tmp_path):
    golden, mine = tmp_path / "t.npz", tmp_path / "mine.json"
    status, out, _ = run(
        "golden", "--out", str(golden), "--layers", "4-4-3", "--activation", "relu", "--optimizer", "momentum"
    )
    assert status == 0
    assert f"into {golden} and {tmp_path / 't.json'}" in out
    assert run("grade", str(golden), str(golden))[:2] == (0, "43 arrays given, 43 right, 0 wrong\n")
    arrays = {key: array.tolist() for key, array in np.load(golden).items() if key.startswith("dW_")}
    arrays["dW_1.1"] = np.transpose(arrays["dW_1.1"]).tolist()
    mine.write_text(json.dumps(arrays))
    for reference in (golden, golden.with_suffix(".json")):
        status, out, _ = run("grade", str(mine), str(reference))
        assert status == 1
        assert "first wrong: dW_1.1" in out
        assert "likely cause: dW is transposed" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["golden"], "Missing option '--out'"),
        (["golden", "--out", "t.json"], "ends in .npz"),
        (["golden", "--out", "t.npz", "--layers", "4"], "give at least two whole numbers"),
        (["golden", "--out", "t.npz", "--activation", "rleu"], "did you mean 'relu'?"),
        (["golden", "--out", "t.npz", "--loss", "quantile"], "unknown loss 'quantile'"),
        (["golden", "--out", "t.npz", "--optimizer", "lion"], "choose from sgd, momentum, adam"),
        (["golden", "--out", "t.npz", "--samples", "0"], "samples is 0"),
        (["golden", "--out", "/proc/t.npz"], "/proc"),
        (["grade", "nowhere.npz"], "no file 'nowhere.npz'"),
        (["grade", "/dev/null"], "holds no arrays by name"),
        (["explain", "--html", "/proc/p.html"], "/proc"),
    ],
)
def test_mistakes_with_golden_files_are_named(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(*arguments)
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
