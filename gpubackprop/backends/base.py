"""The Backend protocol: the operations of the two passes, documented here and nowhere else.

Every array is C-contiguous, two-dimensional unless said otherwise, of the model's dtype, on the backend's device;
``matmul`` alone also takes transposed views. Rows are samples.

Where the model's dtype has 16 bits, arithmetic is done in float32, and the gradients dW and db, the parameters with their
states, dense targets, sample weights and scalars ("real") are float32 too.

Arrays are checked by :mod:`gpubackprop.backends.checks`, in eager calls and where a step is compiled, never while it runs.
A label outside of the classes is an error in an eager call on the host; on a GPU, where the host would have to wait to see it,
and in a compiled step it is the label of no class, as if the sample's row of targets were 0.

An ``out`` may be left out, and is then allocated; nothing else is allocated on the device by a method that is given all its
outputs, but for scratch memory, which a compiled step has of its own and an eager call on a GPU takes from CuPy's pool. No
method but ``to_numpy``, ``synchronize`` and ``asarray`` waits for the device.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from gpubackprop.definitions import Array

if TYPE_CHECKING:
    import numpy as np

    from gpubackprop.activations import Activation
    from gpubackprop.losses import Loss
    from gpubackprop.optimizers import Optimizer
    from gpubackprop.step import Step

# What changes from step to step lives in four small arrays on the device, so that a step never asks the host:
#   counters (2,) int64    [steps taken, first row of the next mini-batch in the shuffled order]
#   rate     (1,) float64  [the base learning rate]
#   scalars  (8,) real     [this step's learning rate, two constants of the optimizer, factor of the gradient, its norm,
#                           loss scale, good steps since it last changed, 1 if this step is skipped]
#   value    (2,) float64  [this batch's loss, sum of the losses since it was last set to 0]
STEPS, CURSOR = 0, 1
RATE, C1, C2, FACTOR, NORM, SCALE, GOOD, SKIP = range(8)

# Dynamic loss scaling for float16 (Micikevicius et al. (2018), section 3.2), with the numbers of torch.amp.GradScaler
FIRST_SCALE, SHRINK, GROW, GROW_AFTER = 65536.0, 0.5, 2.0, 2000.0
# and bounds: many steps in a row that overflow must not take the scale to 0, nor many good ones to infinity
LEAST_SCALE, LARGEST_SCALE = 2.0**-24, 2.0**24


class Run(Protocol):
    """A compiled step."""

    def __call__(self, times: int = 1) -> None:
        """Run the step ``times`` times over; on a GPU, queue it and return."""
        ...


class Backend(Protocol):
    """One device, and the operations of forward, loss, backward and update on it."""

    device: str
    """``"reference"``, ``"cpu"`` or ``"cuda:0"``."""
    xp: ModuleType
    """The array module, ``numpy`` or ``cupy``, for what is not hot."""
    dtypes: tuple[str, ...]
    """The dtypes a model may have here."""

    def asarray(self, a: Any, dtype: npt.DTypeLike | None = None) -> Array:
        """Return ``a`` as a C-contiguous array on this device, copied only if it must be."""
        ...

    def to_numpy(self, a: Array) -> np.ndarray:
        """Return ``a`` on the host, after waiting for what computes it."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has done all work queued so far."""
        ...

    def memory(self, wanted: int = 0) -> tuple[int, int] | None:
        """Return the bytes that may still be allocated on this device and all it has, or None where no limit is known.

        The host's memory is such, and a GPU's where CuPy allocates through another library or from managed memory. If
        ``wanted`` bytes are there only with what the pool keeps of arrays that are gone, the pool gives that back first: then
        all that is free can be had in any sizes.
        """
        ...

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Return a new array of zeros on this device, aligned to 64 bytes, or raise DeviceMemoryError."""
        ...

    def matmul(self, a: Array, b: Array, out: Array | None = None) -> Array:
        """out = a b.

        Shapes
        ------
        a : (m, k); b : (k, n); out : (m, n). ``h.T`` and ``W.T`` are views: nothing is copied.
        """
        ...

    def bias_activation_forward(self, z: Array, b: Array, activation: Activation, out: Array | None = None) -> Array:
        """z <- z + b in place; out = phi(z). ``out`` may be ``z``: then only phi(z) is kept.

        Shapes
        ------
        z, out : (n, d); b : (d,)
        """
        ...

    def bias_activation_backward(
        self,
        dh: Array,
        z: Array | None,
        h: Array | None,
        activation: Activation,
        out: Array | None = None,
        db: Array | None = None,
    ) -> tuple[Array, Array]:
        """delta = dh * phi'(z) and db = sum over rows of delta, in one pass over memory; the sums in a fixed order.

        ``activation.needs`` says which of ``z`` and ``h`` is read; the other may be None. ``out`` may be ``dh``.

        Shapes
        ------
        dh, z, h, out : (n, d); db : (d,); returns (delta, db)
        """
        ...

    def bias_loss(
        self,
        z: Array,
        b: Array,
        y: Array,
        loss: Loss,
        weight: Array | None = None,
        out: Array | None = None,
        db: Array | None = None,
        value: Array | None = None,
        scalars: Array | None = None,
        samples: int | None = None,
        total: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """o = z + b; value = loss(o, y); do = d value / do; db = sum over rows of do, in one pass over the outputs.

        ``z`` becomes o in place, unless ``out`` is ``z``: then only do is kept. Under the reduction ``"mean"``,
        ``weight`` comes from :meth:`normalize_weights`. The sum in ``value[1]`` grows by n times the mean, with ``total`` by
        ``total[0]`` times the mean, or by the sum.
        With ``scalars``, do and db, not the value, are multiplied by the loss scale ``scalars[SCALE]``. Where the rows are a
        part of a mini-batch of ``samples`` samples, the mean is over those, and the value is this part's share of it.

        Shapes
        ------
        z, out : (n, d); b, db : (d,); y : (n, d) real, or (n,) int64 class indices; weight : (n,);
        value : (2,) float64; total : (1,) float64;
        returns (value, do, db)
        """
        ...

    def normalize_weights(self, weight: Array, out: Array | None = None, total: Array | None = None) -> Array:
        """out = weight / sum(weight), total[0] = sum(weight); out = 0 where all weights are 0, which adds nothing.

        Nothing overflows or underflows on the way, however large or small the weights are.

        Shapes
        ------
        weight, out : (n,); total : (1,) float64
        """
        ...

    def dropout(
        self,
        x: Array,
        rate: float,
        seed: int,
        layer: int,
        counters: Array,
        out: Array | None = None,
        first_block: int = 0,
    ) -> Array:
        """out = x / (1 - rate) where a random number of this step keeps the element, else 0. ``out`` may be ``x``.

        The mask depends on seed, layer, ``counters[STEPS]`` and the element's position alone, so the backward pass calls
        the same method on the gradient, and every device drops the same elements. Source: Srivastava et al. (2014),
        inverted; see :mod:`gpubackprop.philox`. Four elements share a block of random numbers; where x is a part of the rows
        of a mini-batch, it begins at element 4 ``first_block`` of them all.
        """
        ...

    def gather(self, source: Array, order: Array, counters: Array, out: Array | None = None) -> Array:
        """out[i] = source[order[counters[CURSOR] + i]]: the next mini-batch.

        What lies outside is cut, so that nothing else is ever read: a place below or beyond ``order`` is its first or last, and
        a row below or beyond ``source`` is its first or last.

        Shapes
        ------
        source : (N, ...); order : (N,) int64; out : (n, ...) (must be given)
        """
        ...

    def accumulate(self, total: Array | None, term: Array, out: Array) -> Array:
        """out = total + term, or term where there is no total yet; ``out`` may be either.

        Shapes
        ------
        total, term, out : (size,) real or float64
        """
        ...

    def clip(self, gradients: Array, max_norm: float, scalars: Array, loss_scaling: bool = False) -> None:
        """scalars[NORM] = |g|, scalars[FACTOR] = min(1, max_norm / (|g| + 1e-6)), as ``torch.nn.utils.clip_grad_norm_``.

        No square overflows on the way: a gradient of finite numbers has a factor above 0. For an infinite one the factor is 0,
        for one with NaN it is NaN.

        With loss scaling, g is the gradient over the scale: scalars[NORM] = |g| / scale and scalars[FACTOR] holds 1 / scale too;
        scalars[SKIP] = 1 where |g| is infinite or NaN, else 0. ``max_norm`` may be infinite.

        Shapes
        ------
        gradients : (size,)
        """
        ...

    def advance(
        self,
        optimizer: Optimizer,
        rate: Array,
        batch: int,
        counters: Array,
        scalars: Array,
        loss_scaling: bool = False,
    ) -> None:
        """Take a step of the schedule: counters += (1, batch); scalars[RATE], [C1], [C2] for the new step count.

        With loss scaling, a skipped step counts no step and halves the scale; 2000 good ones in a row double it; it stays in
        [2^-24, 2^24].
        """
        ...

    def update(
        self,
        optimizer: Optimizer,
        parameters: Array,
        gradients: Array,
        states: Array,
        scalars: Array,
        weights: Array | None = None,
    ) -> None:
        """One step of the optimizer over all parameters at once; the gradient is clipped, not changed.

        With ``weights``, the 16-bit copy of the parameters that the products read, they are written in the same pass, and a
        step with scalars[SKIP] = 1 changes nothing.

        Shapes
        ------
        parameters, gradients, weights : (size,); states : (optimizer.n_states, size)
        """
        ...

    def compile(self, step: Step) -> Run:
        """Return a function that runs the step's operations; everything that can be decided once is decided here."""
        ...
