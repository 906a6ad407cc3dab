"""
A CSV file, in the shell and in Python
======================================

From a file with column names and text labels to predictions and scores: first in the
shell, then in Python. The data are scikit-learn's: 30 measurements of cell nuclei in images of 569
breast tumors.
"""

import csv
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pyarrow import csv as arrow
from sklearn.datasets import load_breast_cancer

import gpubackprop as gb

folder = Path(tempfile.mkdtemp())
data = load_breast_cancer()
with (folder / "cancer.csv").open("w", newline="") as file:
    rows = csv.writer(file)
    rows.writerow([*data.feature_names, "diagnosis"])
    rows.writerows([*sample, data.target_names[label]] for sample, label in zip(data.data, data.target, strict=True))

# %%
# In the shell
# ------------
# ``train`` recognises classes, standardizes the columns, and splits off a validation and a test
# set. The test set is measured once, at the end.


def shell(command: str) -> None:
    """Run a command of gpubackprop in the folder of the data, and print it with its output."""
    print(f"$ {command}")
    words = [sys.executable, "-m", *command.split()]
    print(subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True).stdout)


shell("gpubackprop train cancer.csv --target diagnosis --layers 30-32-2 --epochs 60 --patience 10 --quiet --out run")

# %%
# The first predictions with their probabilities. ``predict`` leaves out what it does not need, here
# the column with the truth. ``gpubackprop evaluate run cancer.csv`` would print the scores.

shell("gpubackprop predict run cancer.csv --probabilities --out predicted.csv")
print("\n".join((folder / "predicted.csv").read_text().splitlines()[:4]))

# %%
# In Python
# ---------
# The run's model is a file like any other.

model = gb.load(folder / "run" / "model.safetensors")
table = arrow.read_csv(folder / "cancer.csv")
print(model.classes, model.predict(table.drop_columns(["diagnosis"]))[:5])

# %%
# Or from the beginning: a table of pyarrow, pandas or polars goes into ``fit`` as it is.

X, y = table.drop_columns(["diagnosis"]), table["diagnosis"]
again = gb.MLP([30, 32, 2])
again.fit(
    X, y, epochs=40, batch_size=32, standardize=True, class_weight="balanced", validation_split=0.2, progress=False
)
print(gb.score(again, X, y))

# %%
# The picture that ``train`` has drawn: the learning curve, and how the test set is predicted.

shutil.copy(folder / "run" / "learning_curve.png", "breast_cancer.png")
