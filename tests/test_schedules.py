"""Learning-rate schedules against PyTorch's, step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.schedules import SCHEDULES, Schedule
from gpubackprop.step.state import RATE


def theirs(make: Any, rate: float, n: int) -> list[float]:
    """Return the rates of n steps of a scheduler of PyTorch."""
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    scheduler, rates = make(torch.optim.lr_scheduler, optimizer), []
    for _ in range(n):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("schedule", "make", "n"),
    [
        (Schedule(0.3), lambda s, o: s.ConstantLR(o, factor=1.0), 5),
        (gb.StepDecay(0.3, step_size=4, gamma=0.5), lambda s, o: s.StepLR(o, 4, 0.5), 14),
        (gb.Exponential(0.3, gamma=0.9), lambda s, o: s.ExponentialLR(o, 0.9), 14),
        (gb.Cosine(0.3, steps=12), lambda s, o: s.CosineAnnealingLR(o, 12), 13),
        (gb.Cosine(0.3, steps=12, final=0.1), lambda s, o: s.CosineAnnealingLR(o, 12, eta_min=0.03), 13),
        (gb.LinearWarmup(0.3, steps=5), lambda s, o: s.LambdaLR(o, lambda t: min((t + 1) / 5, 1)), 9),
        (gb.OneCycle(0.3, steps=20), lambda s, o: s.OneCycleLR(o, 0.3, total_steps=20), 19),
        (gb.OneCycle(0.3, steps=33, warmup=0.5, div=10.0, final_div=50.0),
         lambda s, o: s.OneCycleLR(o, 0.3, total_steps=33, pct_start=0.5, div_factor=10.0, final_div_factor=50.0), 32),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, Schedule) else None,
)  # fmt: skip
def test_rates_are_those_of_pytorch(schedule: Schedule, make: Any, n: int) -> None:
    expected = theirs(make, 0.3, n)
    # PyTorch computes most of them recursively, one rounding or two a step
    assert [schedule.at(t) for t in range(n)] == pytest.approx(expected, rel=1e-12, abs=1e-16)


def test_schedules_stay_at_their_end() -> None:
    assert gb.Cosine(0.3, steps=12, final=0.1).at(10**9) == pytest.approx(0.03, rel=1e-15)
    assert gb.LinearWarmup(0.3, steps=5).at(10**9) == 0.3
    one = gb.OneCycle(0.3, steps=20)
    assert one.at(10**9) == one.at(19) == pytest.approx(0.3 / 25 / 1e4, rel=1e-12)


CHANGING = [
    Schedule(0.2), gb.StepDecay(0.2, step_size=2), gb.Exponential(0.2), gb.Cosine(0.2, steps=3), gb.LinearWarmup(0.2, steps=3),
    gb.OneCycle(0.2, steps=6),
]  # fmt: skip


@pytest.mark.parametrize("schedule", CHANGING, ids=lambda s: type(s).__name__)
def test_the_step_uses_the_rate_of_its_number(schedule: Schedule) -> None:
    model = gb.MLP([2, 2], dtype="float64", device="cpu")
    state = model.state_of(gb.SGD(schedule))
    for t in range(5):
        model.backend.advance(state.optimizer, state.rate, 1, state.counters, state.scalars)
        assert state.scalars[RATE] == pytest.approx(schedule.at(t), rel=4 * np.finfo(float).eps)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gb.Cosine(0.1, steps=0), "steps is 0; it must be a whole number of steps >= 1"),
        (lambda: gb.StepDecay(0.1, step_size=2.5), r"step_size is 2\.5"),  # type: ignore[arg-type]
        (lambda: gb.LinearWarmup(-1.0), r"learning_rate is -1\.0; it must be a number > 0"),
        (lambda: gb.OneCycle(0.1, warmup=1.0), r"warmup is 1\.0; it must be a fraction in \(0, 1\)"),
        (lambda: gb.StepDecay(0.1, step_size=True), "step_size is True; it must be a whole number of steps >= 1"),
        (lambda: gb.StepDecay(0.1, gamma=-1.0), r"gamma is -1\.0; it must be a number > 0"),
        (lambda: gb.Exponential(0.1, gamma=float("nan")), "gamma is nan; it must be a number > 0"),
        (lambda: gb.Exponential(0.1, gamma="0.9"), "gamma is '0.9'; it must be a number > 0"),  # type: ignore[arg-type]
        (lambda: gb.Cosine(0.1, final=-1.0), r"final is -1\.0; it must be a fraction of the rate, in \[0, 1\]"),
        (lambda: gb.OneCycle(0.1, div=0.0), r"div is 0\.0; it must be a number >= 1"),
        (lambda: gb.OneCycle(0.1, final_div=0.0), r"final_div is 0\.0; it must be a number > 0"),
        (lambda: gb.OneCycle(0.1, final_div=1e-3), r"div \* final_div is 0\.025; it must be a number >= 1"),
        (lambda: gb.Cosine(float("inf")), "learning_rate is inf; it must be a number > 0"),
        (lambda: gb.Cosine(True), "learning_rate is True; it must be a number > 0"),
        (lambda: SCHEDULES.resolve("cosin"), r"unknown schedule 'cosin' \(did you mean 'cosine'\?\)"),
    ],
)
def test_errors_say_what_is_allowed(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_schedules_have_names() -> None:
    assert set(SCHEDULES) >= {"constant", "step", "exponential", "cosine", "linear_warmup", "one_cycle"}
