"""Loss and gradients of whole networks on CUDA against the reference, for every activation and every loss."""

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.activations import ACTIVATIONS
from gpubackprop.inspect.explain import random_batch
from gpubackprop.losses import LOSSES

pytestmark = pytest.mark.gpu
SIZES, SAMPLES = [5, 8, 6, 3], 9
PAIRS = [(a, "softmax_cross_entropy") for a in ACTIVATIONS] + [("tanh", name) for name in LOSSES]


@pytest.mark.parametrize(("activation", "loss"), PAIRS)
def test_loss_and_gradients_agree_with_the_reference(activation, loss):
    models = [
        gb.MLP(SIZES, activation, loss, device, dtype)
        for device, dtype in (("cuda", "float32"), ("reference", "float64"))
    ]
    rng = np.random.default_rng(0)
    for b in models[1].parameters.b:
        b[...] = rng.normal(size=b.shape) / 4  # away from the kinks at 0
    models[1].parameters.flat[...] = models[1].parameters.flat.astype(np.float32)
    models[0].load_state_dict(models[1].state_dict())
    X, y = random_batch(models[1], SAMPLES, rng)
    X = X.astype(np.float32).astype(np.float64)
    y = y if y.dtype.kind == "i" else y.astype(np.float32).astype(np.float64)
    weight = rng.uniform(0.5, 2, SAMPLES).astype(np.float32)
    (loss_cuda, cuda), (expected, reference) = (m.loss_and_gradients(X, y, weight) for m in models)
    # Forward and back, 6 sums of at most 9 products and as many functions right to 4 ulp lie on the way to an element;
    # each rounds by eps of the largest term, which is at most 4 times the largest sum: 6 * (9 + 4) * 4 eps.
    bound = 6 * (9 + 4) * 4 * np.finfo(np.float32).eps
    assert abs(float(loss_cuda) - float(expected)) <= bound * max(abs(float(expected)), 1.0)
    for name in ("W", "b"):
        for ours, theirs in zip(getattr(cuda, name), getattr(reference, name), strict=True):
            assert np.abs(ours - theirs).max() <= bound * max(np.abs(theirs).max(), np.abs(reference.flat).max() / 16)
