"""
Gradient flow and dead units
============================

Why does it not learn? Two networks that fail, what ``diagnose`` says about them, and the
gradients of each layer over a training.
"""

from sklearn.datasets import load_digits

import gpubackprop as gb

X, y = load_digits(return_X_y=True)
X = X / 16

# %%
# Vanishing gradients
# -------------------
# Eight layers of sigmoids: its slope is at most 1/4, so each layer passes on a fraction of the
# gradient.

deep = gb.MLP([64, *[32] * 8, 10], activation="sigmoid")
flow = gb.GradientFlow(X[:300], y[:300])
deep.fit(X, y, epochs=20, optimizer=gb.SGD(0.05), callbacks=flow, progress=False)
print(deep.diagnose(X[:300], y[:300]))
flow.plot("gradient_flow_1_sigmoid.png")

# %%
# The same with relu: the gradients of all layers are of one size, and all layers learn. Some
# elements are exactly 0: those of units that are not active for any of these samples, and of
# pixels that are always white.

flow = gb.GradientFlow(X[:300], y[:300])
gb.MLP([64, *[32] * 8, 10]).fit(X, y, epochs=20, optimizer=gb.SGD(0.05), callbacks=flow, progress=False)
flow.plot("gradient_flow_2_relu.png")

# %%
# Dead units
# ----------
# A few steps with a learning rate that is far too large move the biases of a relu network so far
# that most units are never active again. A smaller learning rate would not bring them back.

dead = gb.MLP([64, 64, 32, 10])
dead.fit(X, y, epochs=2, optimizer=gb.SGD(1.5), progress=False)
report = dead.diagnose(X[:300], y[:300])
print(report)
report.plot("gradient_flow_3_dead.png")
