"""
Regression with uncertainty
===========================

Ten networks, each with its own initial weights and its own resampled data, agree where there
are data and disagree in the gap between them: their spread is a measure of what the data do not
say.
"""

import numpy as np
from matplotlib import pyplot as plt

import gpubackprop as gb

rng = np.random.default_rng(0)
x = np.concatenate([rng.uniform(-3, -0.5, 80), rng.uniform(1.5, 3, 60)])[:, None]  # nothing between -0.5 and 1.5
y = np.sin(2 * x[:, 0]) + 0.3 * x[:, 0] + rng.normal(0, 0.15, len(x))

# %%
# The seed decides the initial weights and the order of the mini-batches. Nothing is compiled anew
# for the second network.

grid = np.linspace(-4, 4, 200)[:, None]
predictions = []
for seed in range(10):
    rows = rng.integers(0, len(x), len(x))  # a bootstrap sample
    model = gb.MLP([1, 64, 64, 1], activation="tanh", loss="mean_squared_error", seed=seed)
    model.fit(x[rows], y[rows], epochs=400, batch_size=35, optimizer=gb.Adam(3e-3), progress=False)
    predictions.append(model.predict(grid))
mean, spread = np.mean(predictions, axis=0), np.std(predictions, axis=0)

# %%
# The standard deviation of the ten, where there are data and where there are none:

for where, at in (("data", -2.0), ("gap", 0.5)):
    print(f"{where:4s}  x = {at:4.1f}  standard deviation {spread[np.abs(grid[:, 0] - at).argmin()]:.2f}")

# %%
# The spread says where the networks do not know, not how far they are off: in the gap the truth
# leaves the band of two deviations.

figure, ax = plt.subplots(figsize=(8, 3.8), layout="constrained")
for o in predictions:
    ax.plot(grid, o, color="#2e86ab", linewidth=0.6, alpha=0.5)
ax.fill_between(
    grid[:, 0], mean - 2 * spread, mean + 2 * spread, color="#2e86ab", alpha=0.2, label="mean ± 2 deviations"
)
ax.plot(grid, mean, color="#2e86ab", linewidth=2, label="mean of 10 networks")
ax.plot(grid, np.sin(2 * grid) + 0.3 * grid, color="0.4", linestyle="--", linewidth=1, label="truth")
ax.plot(x, y, ".", color="#d1495b", markersize=4, label="data")
ax.set(xlabel="x", ylabel="y", ylim=(-3.2, 3.2))
ax.legend(frameon=False, fontsize=8, ncols=4, loc="upper center")
figure.savefig("uncertainty.png", dpi=130)
