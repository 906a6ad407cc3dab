"""Optimizers: five steps against PyTorch, with every option; Lion against its paper; states, clipping, errors, custom ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from tolerances import assert_within

import gpubackprop as gb
from gpubackprop.definitions import NUMPY
from gpubackprop.kernels.cpu import training as cpu
from gpubackprop.optimizers import OPTIMIZERS, Optimizer
from gpubackprop.schedules import SCHEDULES
from gpubackprop.step.state import FACTOR

STEPS = 7
CASES = [
    ("SGD", {}, {}),
    ("SGD", {"weight_decay": 0.1}, {}),
    ("SGD", {"momentum": 0.9}, {}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05}, {}),
    ("Adam", {}, {}),
    ("Adam", {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}, {}),
    ("Adam", {"amsgrad": True}, {}),
    ("AdamW", {}, {}),
    ("AdamW", {"weight_decay": 0.3, "amsgrad": True}, {}),
    ("RMSprop", {}, {}),
    ("RMSprop", {"alpha": 0.8, "momentum": 0.7, "weight_decay": 0.1, "eps": 1e-4}, {}),
    ("RMSprop", {"centered": True, "momentum": 0.5}, {}),
    ("Adagrad", {}, {}),
    ("Adagrad", {"lr_decay": 0.3, "weight_decay": 0.1}, {}),
    ("SGD", {"momentum": 0.9}, {"clip_norm": 1.0}),
    ("Adam", {}, {"clip_value": 0.3}),
    ("AdamW", {}, {"clip_norm": 1.5, "clip_value": 0.4}),
]


def run(backend: Any, optimizer: Any, theta: np.ndarray, gradients: np.ndarray) -> list[np.ndarray]:
    """Return the parameters after each step."""
    p, counters = backend.asarray(theta.copy()), backend.zeros((2,), np.int64)
    rate = backend.asarray(np.array([optimizer.schedule.learning_rate]))
    scalars, states = backend.zeros((8,), theta.dtype), backend.zeros((optimizer.n_states, len(theta)), theta.dtype)
    scalars[FACTOR] = 1
    result = []
    for gradient in gradients:
        g = backend.asarray(gradient.astype(theta.dtype))
        if optimizer.clipping[0] is not None:
            backend.clip(g, optimizer.clipping[0], scalars)
        backend.advance(optimizer, rate, 1, counters, scalars)
        backend.update(optimizer, p, g, states, scalars)
        result.append(backend.to_numpy(p).copy())
    return result


@pytest.mark.parametrize(("name", "options", "clipping"), CASES, ids=lambda v: v if isinstance(v, str) else ",".join(v))
def test_steps_are_those_of_pytorch(name: str, options: dict, clipping: dict, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    theta, gradients = rng.normal(size=11), rng.normal(size=(STEPS, 11))
    gradients[3] = 0  # nothing may go wrong where there is no gradient
    gradients[4, :5] *= 100
    p = torch.tensor(theta, requires_grad=True)
    optimizer = getattr(torch.optim, name)([p], lr=0.05, **options)
    got = run(gb.get_backend("reference"), getattr(gb, name)(0.05, **options, **clipping), theta, gradients)
    for step, gradient in enumerate(gradients):
        p.grad = torch.tensor(gradient)
        if "clip_norm" in clipping:
            torch.nn.utils.clip_grad_norm_([p], clipping["clip_norm"])
        if "clip_value" in clipping:
            torch.nn.utils.clip_grad_value_([p], clipping["clip_value"])
        optimizer.step()
        # about 20 roundings a step of numbers near 1; centered RMSprop divides by sqrt(v - mean^2), which cancels
        assert_within(got[step], p.detach().numpy(), 1e-13 * (100 if options.get("centered") else 1))


@pytest.mark.parametrize(("name", "options", "clipping"), CASES, ids=lambda v: v if isinstance(v, str) else ",".join(v))
def test_the_compiled_update_is_that_of_the_reference(
    name: str, options: dict, clipping: dict, rng: np.random.Generator
) -> None:
    theta, gradients = rng.normal(size=11), rng.normal(size=(STEPS, 11))
    optimizer = getattr(gb, name)(0.05, **options, **clipping)
    expected = run(gb.get_backend("reference"), optimizer, theta, gradients)
    got = run(gb.get_backend("cpu"), optimizer, theta, gradients)
    assert_within(got, expected, 1e-12)  # as above, with fused multiply-adds


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lion_is_algorithm_2_of_its_paper(weight_decay: float, rng: np.random.Generator) -> None:
    theta, gradients = rng.normal(size=11), rng.normal(size=(STEPS, 11))
    gradients[0, 0] = 0  # the sign of 0 is 0
    got = run(
        gb.get_backend("reference"), gb.Lion(0.05, betas=(0.8, 0.95), weight_decay=weight_decay), theta, gradients
    )
    m = np.zeros(11)
    for step, g in enumerate(gradients):
        c = 0.8 * m + (1 - 0.8) * g
        theta = theta - 0.05 * (np.sign(c) + weight_decay * theta)
        m = 0.95 * m + (1 - 0.95) * g
        assert_within(got[step], theta, 1e-14 * 10)


def test_lion_does_not_move_where_there_is_no_gradient() -> None:
    (got,) = run(gb.get_backend("reference"), gb.Lion(0.05), np.array([1.0, 2.0]), np.array([[0.0, -3.0]]))
    assert got.tolist() == [1.0, 2.05]


@pytest.mark.parametrize(
    ("optimizer", "n"),
    [
        (gb.SGD(), 0), (gb.SGD(momentum=0.5), 1), (gb.Adam(), 2), (gb.Adam(amsgrad=True), 3), (gb.AdamW(), 2),
        (gb.RMSprop(), 1), (gb.RMSprop(momentum=0.1), 2), (gb.RMSprop(centered=True), 3), (gb.Adagrad(), 1), (gb.Lion(), 1),
    ],
)  # fmt: skip
def test_an_optimizer_has_as_many_states_as_it_needs(optimizer: Any, n: int) -> None:
    assert optimizer.n_states == n
    model = gb.MLP([2, 2], device="reference")
    assert model.state_of(optimizer).states.shape == (n, model.parameters.flat.size)


def test_padding_between_the_parameters_stays_zero(device: str, rng: np.random.Generator) -> None:
    model = gb.MLP([3, 5, 2], device=device)
    X, y = rng.normal(size=(8, 3)), rng.integers(0, 2, 8)
    model.fit(X, y, epochs=2, batch_size=8, optimizer=gb.AdamW(0.1), progress=False)
    flat = model.backend.to_numpy(model.parameters.flat).copy()
    inside = gb.MLP([3, 5, 2], device="reference").parameters
    inside.flat[...] = 0
    for a in (*inside.W, *inside.b):
        a[...] = 1
    assert not flat[inside.flat == 0].any()
    assert (inside.flat == 0).sum() == flat.size - inside.count > 0


def test_clip_norm_leaves_a_small_gradient_alone(device: str, rng: np.random.Generator) -> None:
    backend = gb.get_backend(device)
    theta, gradients = rng.normal(size=9).astype(np.float32), rng.normal(size=(2, 9)).astype(np.float32)
    a = run(backend, gb.SGD(0.1, clip_norm=1e3), theta, gradients)
    b = run(backend, gb.SGD(0.1), theta, gradients)
    assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gb.SGD(0.0), r"learning_rate is 0\.0; it must be a number > 0"),
        (lambda: gb.SGD(float("nan")), "learning_rate is nan"),
        (lambda: gb.SGD(nesterov=True), "nesterov is True; it must be False where momentum is 0"),
        (lambda: gb.SGD(momentum=-0.1), r"momentum is -0\.1; it must be a number >= 0"),
        (lambda: gb.Adam(betas=(0.9, 1.0)), r"betas is \(0\.9, 1\.0\); it must be two numbers in \[0, 1\)"),
        (lambda: gb.Adam(betas=(0.9,)), "two numbers"),
        (lambda: gb.Adam(eps=0.0), r"eps is 0\.0; it must be a number > 0"),
        (lambda: gb.AdamW(weight_decay=-1), "weight_decay is -1"),
        (lambda: gb.RMSprop(alpha=1.0), r"alpha is 1\.0; it must be in \[0, 1\)"),
        (lambda: gb.Adam(clip_norm=0), "clip_norm is 0; it must be None or a number > 0"),
        (lambda: gb.SGD(clip_value=-2), "clip_value is -2"),
        (lambda: gb.LBFGS(history_size=0), "history_size is 0"),
        (lambda: gb.LBFGS(learning_rate=0.5), "the line search sets it"),
        (
            lambda: OPTIMIZERS.resolve("adm"),
            r"unknown optimizer 'adm' \(did you mean 'adam'\?\); choose from sgd, adam",
        ),
        (lambda: gb.MLP([2, 2], device="reference").state_of(3), "optimizer is 3; give a name or an optimizer"),
    ],
)
def test_errors_say_what_is_allowed(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_name_is_the_optimizer_with_its_defaults() -> None:
    model = gb.MLP([2, 2], device="reference")
    assert model.state_of("rmsprop").optimizer == gb.RMSprop()
    assert OPTIMIZERS["adamw"] is gb.AdamW


ONE_KERNEL = [
    (gb.SGD(0.1, momentum=0.9), gb.SGD(0.2, momentum=0.5, weight_decay=0.1)),
    (gb.SGD(clip_value=1.0), gb.SGD(clip_value=0.01, clip_norm=2.0)),
    (gb.Adam(), gb.Adam(0.2, betas=(0.7, 0.8), eps=0.1, weight_decay=0.1)),
    (gb.AdamW(), gb.AdamW(weight_decay=0.5)),
    (gb.RMSprop(), gb.RMSprop(alpha=0.6, eps=0.1, weight_decay=0.1)),
    (gb.Adagrad(), gb.Adagrad(lr_decay=0.5, eps=0.1, weight_decay=0.1)),
    (gb.Lion(), gb.Lion(betas=(0.6, 0.7), weight_decay=0.1)),
    (gb.SGD(gb.StepDecay(0.1)), gb.SGD(gb.StepDecay(0.1, step_size=2, gamma=0.3))),
    (gb.SGD(gb.Exponential(0.1)), gb.SGD(gb.Exponential(0.1, gamma=0.3))),
    (gb.SGD(gb.Cosine(0.1)), gb.SGD(gb.Cosine(0.1, steps=7, final=0.5))),
    (gb.SGD(gb.LinearWarmup(0.1)), gb.SGD(gb.LinearWarmup(0.1, steps=7))),
    (gb.SGD(gb.OneCycle(0.1)), gb.SGD(gb.OneCycle(0.1, steps=7, warmup=0.5, div=3.0, final_div=9.0))),
]


@pytest.mark.parametrize(("one", "other"), ONE_KERNEL, ids=lambda o: repr(o))
def test_numbers_are_data_not_code(one: Any, other: Any) -> None:
    assert one.fingerprint == other.fingerprint
    for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        for compile_ in (cpu.compile_update, cpu.compile_advance):
            assert compile_(one, dtype) is compile_(other, dtype)


def test_what_a_step_does_is_code() -> None:
    others = [
        gb.SGD(), gb.SGD(momentum=0.9), gb.SGD(momentum=0.9, nesterov=True), gb.Adam(), gb.AdamW(), gb.Adam(amsgrad=True),
        gb.Adam(betas=(0.1, 0.999)), gb.Adam(clip_value=1.0), gb.Adam(gb.Cosine(0.1)), gb.Adam(gb.StepDecay(0.1)), gb.RMSprop(),
        gb.RMSprop(momentum=0.9), gb.RMSprop(centered=True), gb.Adagrad(), gb.Lion(),
    ]  # fmt: skip
    assert len({o.fingerprint for o in others}) == len(others)


def test_numbers_are_data_on_cuda() -> None:
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
    from gpubackprop.kernels.cuda import training as cuda_training

    F4, one, other = np.dtype(np.float32), *ONE_KERNEL[2]
    assert cuda_training.update(one, F4, 4) is cuda_training.update(other, F4, 4)
    assert cuda_training.advance(one, F4, False) is cuda_training.advance(other, F4, False)


def test_kernels_in_use_follow_each_optimizers_own_numbers(device: str, rng: np.random.Generator) -> None:
    backend = gb.get_backend(device)
    theta, gradients = rng.normal(size=9), rng.normal(size=(3, 9))
    for one, other in (*ONE_KERNEL[1:3], ONE_KERNEL[9]):
        for optimizer in (one, other, one):
            expected = np.array(run(gb.get_backend("reference"), optimizer, theta, gradients))
            assert_within(np.array(run(backend, optimizer, theta, gradients)), expected, 1e-14 * (1 + np.abs(expected)))


def test_a_formula_of_ones_own_on_top_of_another_class_needs_no_numbers(device: str, rng: np.random.Generator) -> None:
    factor = 0.25

    @dataclass(frozen=True)
    class QuarterAdam(gb.Adam):
        """SGD at a quarter of the rate, with Adam's fields."""

        def define(self, real: Any, m: Any) -> Any:
            def constants(t: float, lr: float) -> Any:
                return lr * factor, 0.0, 0.0

            def update(p: Any, g: Any, s0: Any, s1: Any, s2: Any, lr: Any, c1: Any, c2: Any) -> Any:
                return p - lr * g, s0, s1, s2

            return constants, update

    @dataclass(frozen=True)
    class Half(gb.Cosine):
        """Half the rate."""

        def define(self, m: Any) -> Any:
            return lambda t: 0.5

    try:
        assert QuarterAdam().numbers == Half(0.1).numbers == ()
        theta, g = rng.normal(size=9), rng.normal(size=(1, 9))
        (got,) = run(gb.get_backend(device), QuarterAdam(Half(0.8)), theta, g)
        assert_within(got, theta - 0.1 * g[0], 1e-15 * (1 + np.abs(theta)))
    finally:
        del OPTIMIZERS["quarteradam"], SCHEDULES["half"]


def test_an_optimizer_of_ones_own_drops_in(device: str, rng: np.random.Generator) -> None:
    @dataclass(frozen=True)
    class SignSGD(Optimizer):
        """p <- p - eta sign(g)."""

        def define(self, real: Any, m: Any) -> Any:
            zero, one, where = real(0), real(1), m.where

            def constants(t: float, lr: float) -> Any:
                return lr, 0.0, 0.0

            def update(p: Any, g: Any, s0: Any, s1: Any, s2: Any, lr: Any, c1: Any, c2: Any) -> Any:
                return p - lr * where(g > zero, one, where(g < zero, -one, zero)), s0, s1, s2

            return constants, update

    try:
        model = gb.MLP([3, 4, 2], device=device, dtype="float64")
        X, y = rng.normal(size=(8, 3)), rng.integers(0, 2, 8)
        before = model.backend.to_numpy(model.parameters.flat).copy()
        _, gradients = model.loss_and_gradients(X, y)
        model.fit(X, y, epochs=1, batch_size=8, optimizer="signsgd", progress=False)
        expected = before - 0.01 * np.sign(gradients.flat)
        assert_within(model.backend.to_numpy(model.parameters.flat), expected, 1e-15)
    finally:
        del OPTIMIZERS["signsgd"]


AVERAGING = [
    gb.Adam(0.1), gb.Adam(0.1, betas=(0.0, 0.3), amsgrad=True), gb.AdamW(0.1), gb.RMSprop(0.1), gb.RMSprop(0.1, alpha=0.2),
    gb.RMSprop(0.1, centered=True, momentum=0.5), gb.Lion(0.1), gb.Lion(0.1, betas=(0.4, 0.3)), gb.Adagrad(0.1),
]  # fmt: skip


@pytest.mark.parametrize("optimizer", AVERAGING, ids=repr)
def test_running_averages_have_gain_1(optimizer: Any) -> None:
    # what the averages of g and g^2 come to for a constant g, in float32, whatever b and 1 - b are rounded to
    update, numbers = optimizer.define(np.float32, NUMPY)[1], tuple(map(np.float32, optimizer.numbers))
    g, p = np.float32(3.7), np.float32(1)
    states = (np.float32(0),) * 3
    for t in range(1, 12001):
        _, *states = update(p, g, *states, np.float32(0.1), np.float32(0.1), np.float32(1), *numbers)
        if t > 3000 and "0.999" not in repr(optimizer):
            break
    name = type(optimizer).__name__
    if name in ("Adam", "AdamW"):
        averages = [(states[0], 3.7), (states[1], 3.7**2)]
    elif name == "RMSprop":
        averages = [(states[2], 3.7)] if optimizer.centered else [(states[0], 3.7**2)]
    else:
        averages = [(states[0], 3.7)] if name == "Lion" else []
    for average, expected in averages:
        # an average stops growing where (1 - b) (x - v) is below half a rounding of v: eps / 2 / (1 - b) of it
        assert float(average) == pytest.approx(expected, rel=2**-24 / 1e-3 if expected > 4 else 2**-24 / 1e-2)
        assert float(average) <= expected * (1 + 2**-22)


@pytest.mark.parametrize("change", [0.0, 1e-7, 1e-5, 1e-3])
def test_the_variance_of_centered_rmsprop_is_never_negative(change: float, rng: np.random.Generator) -> None:
    gradients = 1e4 * (1 + change * rng.normal(size=(300, 50)))
    for backend in ("reference", "cpu"):
        theta = np.zeros(50, np.float32)
        got = run(gb.get_backend(backend), gb.RMSprop(1e-3, centered=True), theta, gradients)
        assert np.isfinite(got).all()
    # and it is the variance: E g^2 - (E g)^2 with the weights of the averages, in float64
    weights = 0.01 * 0.99 ** np.arange(299, -1, -1)
    optimizer = gb.RMSprop(centered=True)
    _, update = optimizer.define(np.float64, NUMPY)
    states = (np.zeros(50),) * 3
    for g in gradients:
        _, *states = update(np.zeros(50), g, *states, 0.1, 0.0, 0.0, *optimizer.numbers)
    mean = weights @ gradients
    # about mean, with what has not been met (0, of weight 0.99^300) among the values
    variance = weights @ (gradients - mean) ** 2 + 0.99**300 * mean**2
    assert_within(states[0], variance, 1e-12 * variance)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("optimizer", AVERAGING, ids=repr)
def test_a_gradient_whose_square_overflows_makes_a_step_like_any_other(optimizer: Any, dtype: str) -> None:
    huge = float(np.finfo(dtype).max) / 2
    for backend in ("reference", "cpu"):
        theta = np.ones(3, dtype)
        gradients = np.array([[huge, -huge, 1.0], [huge, huge, 1.0], [1.0, 0.0, 1.0]])
        steps = np.abs(np.diff([theta, *run(gb.get_backend(backend), optimizer, theta, gradients)], axis=0))
        assert np.isfinite(steps).all()
        assert steps[0].min() > 0.01
        assert steps.max() < 1.5 * (10 if getattr(optimizer, "alpha", 0) > 0.9 else 1)
        broken = run(gb.get_backend(backend), optimizer, theta, np.array([[np.inf, np.nan, 1.0]] * 2))[-1]
        assert np.isnan(broken).tolist() == [True, True, False]


def test_a_users_optimizer_is_not_judged_by_the_names_of_its_fields() -> None:
    @dataclass(frozen=True)
    class Named(Optimizer):
        """Fields that mean something else here."""

        alpha: float = 5.0
        momentum: str = "heavy"
        betas: float = -3.0
        eps: float = 0.0
        weight_decay: float = -1.0

    try:
        assert Named(0.1, eps=np.float32(-2)).eps == -2
    finally:
        del OPTIMIZERS["named"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gb.SGD("0.1"), "learning_rate is '0.1'; it must be a number > 0"),
        (lambda: gb.SGD(True), "learning_rate is True"),
        (lambda: gb.SGD(np.float32("nan")), "learning_rate is nan"),
        (lambda: gb.SGD(0.1, momentum=float("nan")), "momentum is nan; it must be a number >= 0"),
        (lambda: gb.Adam(betas=(True, 0.9)), "betas is"),
        (lambda: gb.Adam(amsgrad="no"), "amsgrad is 'no'; it must be True or False"),
        (lambda: gb.RMSprop(centered=1), "centered is 1; it must be True or False"),
        (lambda: gb.Adam(clip_norm=0), "clip_norm is 0; it must be None or a number > 0"),
        (lambda: gb.LBFGS(history_size=2.5), "history_size is 2.5; it must be a whole number >= 1"),
        (lambda: gb.Adam(eps=1e-60).define(np.float32, NUMPY), "eps is 1e-60, which float32 has no number for"),
    ],
)
def test_hyperparameters_are_checked_by_their_class(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_numpy_scalars_are_numbers() -> None:
    adam = gb.Adam(
        np.float32(0.5),
        betas=np.array([0.5, 0.75], np.float32),
        eps=np.float64(1e-6),
        amsgrad=np.bool_(True),
        clip_norm=np.int64(3),
    )
    assert adam == gb.Adam(0.5, betas=(0.5, 0.75), eps=1e-6, amsgrad=True, clip_norm=3)
    values = (adam.learning_rate, *adam.betas, adam.eps, adam.amsgrad, adam.clip_norm)
    assert [type(v) for v in values] == [float, float, float, float, bool, int]
    assert gb.LBFGS(history_size=np.int32(4)).history_size == 4
    assert type(gb.Cosine(np.float32(0.5), steps=np.int64(7)).steps) is int
