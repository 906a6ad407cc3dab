"""
An activation of your own
=========================

One function of scalars and its derivative: the reference backend calls it on arrays, and the
kernels of CPU and GPU are compiled from the same text.
"""

import numpy as np

import gpubackprop as gb
from gpubackprop.activations import activation
from gpubackprop.inspect import pictures


@activation(needs="z")
def snake(real, m, frequency=1.0):
    """phi(z) = z + sin(a z)^2 / a. Source: Ziyin, Hartwig, Ueda (2020), eq. 3."""
    a, one, two, sin = real(frequency), real(1), real(2), m.sin

    def phi(z):
        s = sin(a * z)
        return z + s * s / a

    def dphi(z, h):
        return one + sin(two * a * z)

    return phi, dphi


# %%
# Is the derivative right? Finite differences in float64 say so, for every gradient of the
# network.

rng = np.random.default_rng(0)
X = rng.uniform(-4, 4, (600, 2))
y = (np.sin(2 * X[:, 0]) + np.cos(2 * X[:, 1]) > 0).astype(int)  # islands
print(gb.check_gradients(gb.MLP([2, 8, 2], "snake"), X[:20], y[:20]))

# %%
# It goes by its name like the others, on each device, and takes its parameters in a call.

for name in ("relu", snake(frequency=2.0)):
    model = gb.MLP([2, 32, 32, 2], activation=name)
    model.fit(X, y, epochs=150, batch_size=50, optimizer=gb.Adam(3e-3), progress=False)
    print(model.architecture.activations[0].label, model.evaluate(X, y))
pictures.decision_boundary(model, X, y).write("own_activation.png")
