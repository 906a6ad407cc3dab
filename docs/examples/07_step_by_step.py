"""
Backpropagation, step by step
=============================

The text on backpropagation that this package follows, in NumPy, part by part and beside what
the package computes. ``gpubackprop explain`` prints the same for any network.
"""

import numpy as np
from matplotlib import pyplot as plt

import gpubackprop as gb

# %%
# The chain rule of calculus
# --------------------------
# q = f(p), r = g(q), s = h(r): ds/dp = ds/dr dr/dq dq/dp.

p = 0.7
q = p**2
r = np.sin(q)
s = np.exp(r)
ds_dr, dr_dq, dq_dp = np.exp(r), np.cos(q), 2 * p
e = 1e-6
differences = (np.exp(np.sin((p + e) ** 2)) - np.exp(np.sin((p - e) ** 2))) / (2 * e)
print(f"ds/dp = {ds_dr * dr_dq * dq_dp:.6f}, by differences {differences:.6f}")

# %%
# The chain rule for vectors
# --------------------------
# With r = A p, the gradient with respect to p is the Jacobian, transposed, times the gradient
# with respect to r.

rng = np.random.default_rng(0)
A, vector = rng.normal(size=(3, 2)), rng.normal(size=2)


def scalar_of(p):
    """s = sum of sin(r), r = A p."""
    return np.sin(A @ p).sum()


grad_r = np.cos(A @ vector)
grad_p = A.T @ grad_r
print(
    "∇p",
    grad_p,
    "by differences",
    np.array([scalar_of(vector + d) - scalar_of(vector - d) for d in e * np.eye(2)]) / (2 * e),
)

# %%
# The forward propagation phase
# -----------------------------
# A network with L = 2 hidden layers. Rows are samples, so that W^T h + b of the text, a column,
# is h W + b here.

model = gb.MLP([2, 4, 3, 1], activation="tanh", loss="mean_squared_error", dtype="float64", device="reference", seed=2)
W_1, W_2, W_o = model.parameters.W
b_1, b_2, b_o = model.parameters.b
X = rng.normal(size=(50, 2))
y = np.sin(X[:, :1] + X[:, 1:])

h_1 = np.tanh(X @ W_1 + b_1)  # 1. the output of the first hidden layer
h_2 = np.tanh(h_1 @ W_2 + b_2)  # 2. of each hidden layer after it
o = h_2 @ W_o + b_o  # 3. the output of the network
loss = ((o - y) ** 2).mean()  # 4. the loss

# %%
# The backward propagation phase
# ------------------------------
# From the output to the input, since each gradient needs the one after it: ∇W_l ⇐ ∇h_l ⇐ ∇h_(l+1)
# ⇐ ∇o.

do = 2 * (o - y) / o.size  # 1. of the output; stored for steps 2 and 3
dW_o, db_o = h_2.T @ do, do.sum(axis=0)  # 2. of the parameters of the output layer
dh_2 = do @ W_o.T  # 3. of the outermost hidden layer; stored for steps 4 and 5
delta_2 = dh_2 * (1 - h_2**2)
dW_2, db_2 = h_1.T @ delta_2, delta_2.sum(axis=0)  # 4. of its parameters
dh_1 = delta_2 @ W_2.T  # 5. l = 1: its output and its parameters, by those of layer 2
delta_1 = dh_1 * (1 - h_1**2)
dW_1, db_1 = X.T @ delta_1, delta_1.sum(axis=0)  # 6. l = 1: terminate

# %%
# The package stores the same arrays, whatever device it runs on.

trace = model.trace(X, y)
mine = {"dW_1": dW_1, "dW_2": dW_2, "dW_o": dW_o, "db_1": db_1, "db_2": db_2, "db_o": db_o, "dh_1": dh_1, "dh_2": dh_2}
for name, expected in mine.items():
    field, layer = name.split("_")
    found = getattr(trace.layers[{"1": 0, "2": 1, "o": 2}[layer]], field)
    print(f"{name}  largest difference {abs(found - expected).max():.1e}")
print(f"loss  {loss:.6f} and {float(trace.loss):.6f}")

# %%
# Iterate till convergence
# ------------------------
# Parameters move against the gradient, Θ ← Θ − η ∇Θ, and all of it again, until the loss no
# longer falls. A step with the whole data set is one epoch here.

history = model.fit(
    X, y, epochs=10_000, batch_size=50, optimizer=gb.SGD(0.1), tol=1e-6, n_iter_no_change=20, progress=False
)  # fmt: skip
print(history.stopped, "after", len(history["loss"]), "iterations, loss", f"{history['loss'][-1]:.6f}")

figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
axes[0].plot(range(1, len(history["loss"]) + 1), history["loss"], color="#2e86ab")
axes[0].set(xlabel="iteration", ylabel="loss", xscale="log", yscale="log", title="till convergence")
names = [name for name in mine if name.startswith("d")]
axes[1].bar(names, [np.linalg.norm(mine[name]) for name in names], color="#2e86ab")
axes[1].set(ylabel="norm", title="the gradients of the first iteration")
axes[1].tick_params(axis="x", labelsize=8)
for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)
figure.savefig("step_by_step.png", dpi=130)
