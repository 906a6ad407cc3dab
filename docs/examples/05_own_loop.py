"""
A training loop of your own
===========================

The two passes and the update, written with the operations of a backend: each is one call and
one kernel. ``device = "cuda"`` is the only change for a GPU.
"""

import numpy as np
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits

import gpubackprop as gb

device = "cpu"
backend = gb.get_backend(device)
relu, loss = gb.activations.ACTIVATIONS["relu"], gb.losses.LOSSES["softmax_cross_entropy"]

images, labels = load_digits(return_X_y=True)
X, y = backend.asarray(images / 16, np.float32), backend.asarray(labels, np.int64)

# %%
# The parameters of a network, so that both start from the same weights: views into one array,
# here copied.

model = gb.MLP([64, 48, 10], device=device, seed=1)
(W_1, W_o), (b_1, b_o) = ([a.copy() for a in part] for part in (model.parameters.W, model.parameters.b))

losses, batch, learning_rate = [], 100, np.float32(0.2)
for _ in range(20):
    total = 0.0
    for start in range(0, len(X), batch):
        x, t = X[start : start + batch], y[start : start + batch]
        # forward: z = h W, then h = phi(z + b) in one pass over memory, and the loss with its gradient in another
        z_1 = backend.matmul(x, W_1)
        h_1 = backend.bias_activation_forward(z_1, b_1, relu)
        o = backend.matmul(h_1, W_o)
        value, do, db_o = backend.bias_loss(o, b_o, t, loss)
        # backward: h.T and W.T are views; delta and the bias gradient come from one pass
        dW_o = backend.matmul(h_1.T, do)
        dh_1 = backend.matmul(do, W_o.T)
        delta_1, db_1 = backend.bias_activation_backward(dh_1, z_1, h_1, relu)
        dW_1 = backend.matmul(x.T, delta_1)
        for parameter, gradient in ((W_1, dW_1), (b_1, db_1), (W_o, dW_o), (b_o, db_o)):
            parameter -= learning_rate * gradient
        total += float(value[0]) * len(x)
    losses.append(total / len(X))

# %%
# ``fit`` does the same in one compiled step. In the order of the data, so that both see the same
# mini-batches:

history = model.fit(X, y, epochs=20, batch_size=batch, optimizer=gb.SGD(0.2), shuffle=False, progress=False)
print(f"largest difference of a weight: {abs(backend.to_numpy(model.parameters.W[0] - W_1)).max():.1e}")
print(f"loss of the last epoch: {losses[-1]:.6f} here, {history['loss'][-1]:.6f} by fit")

figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
ax.plot(range(1, 21), history["loss"], color="#2e86ab", linewidth=6, alpha=0.3, label="fit")
ax.plot(range(1, 21), losses, color="#d1495b", label="this loop")
ax.set(xlabel="epoch", ylabel="loss", yscale="log", xticks=[1, 5, 10, 15, 20])
ax.legend(frameon=False)
ax.spines[["top", "right"]].set_visible(False)
figure.savefig("own_loop.png", dpi=130)
