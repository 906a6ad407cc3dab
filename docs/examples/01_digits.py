"""
Handwritten digits
==================

Train on 8 x 8 images of digits, and look at what the network gets wrong.
"""

from sklearn.datasets import load_digits

import gpubackprop as gb
from gpubackprop.inspect import pictures

X, y = load_digits(return_X_y=True)
train, test = slice(0, 1400), slice(1400, None)

# %%
# The images are bytes up to 16: ``scale=16`` divides by it, and the network keeps that, so that
# every later call takes the raw images. A tenth of the training set is split off; early stopping
# goes by it and keeps the best parameters.

model = gb.MLP([64, 128, 64, 10], activation="gelu", dropout=0.2)
history = model.fit(
    X[train], y[train], epochs=100, batch_size=32, scale=16, validation_split=0.1,
    callbacks=gb.EarlyStopping(patience=10), progress=False,
)  # fmt: skip
print(history)
print(gb.score(model, X[test], y[test]))

# %%
# The learning curve, and the surest mistakes first.

history.plot("digits_1_curve.png")
pictures.wrong_examples(model, X[test], y[test], shape=(8, 8), most=10).write("digits_2_wrong.png")
