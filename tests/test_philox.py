"""Philox against the known answers of Random123; masks of dropout: their rate, their seeds, the same on every device."""

from __future__ import annotations

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.philox import define_philox, keep_threshold, random_uint32, split_seed

# counter, key, result: philox4x32 with 10 rounds in kat_vectors of Random123 1.14
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[np.ndarray]:
    """Return hexadecimal words as arrays of one uint32."""
    return [np.array([int(word, 16)], np.uint32) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    philox = define_philox(lambda x: x.astype(np.uint32), lambda x: x.astype(np.uint64))
    assert [int(word[0]) for word in philox(*words(counter), *words(key))] == [int(w, 16) for w in expected.split()]


def test_the_place_of_seed_step_and_layer_in_the_counter() -> None:
    philox = define_philox(lambda x: x.astype(np.uint32), lambda x: x.astype(np.uint64))
    seed, step, layer = 0x0123456789ABCDEF, 77, 3
    block = [np.array([v], np.uint32) for v in (2, 0, step, layer, 0x89ABCDEF, 0x01234567)]
    expected = [int(word[0]) for word in philox(*block)]
    assert random_uint32(12, seed, step, layer)[8:].tolist() == expected
    assert split_seed(seed) == (0x89ABCDEF, 0x01234567)


def test_fewer_numbers_are_the_first_of_more() -> None:
    many = random_uint32(101, 5, 6, 7)
    for n in (1, 2, 3, 4, 5, 100):
        assert np.array_equal(random_uint32(n, 5, 6, 7), many[:n])


def test_other_seeds_steps_and_layers_give_other_numbers() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len({tuple(random_uint32(8, *key)) for key in keys}) == len(keys)


def test_numbers_are_uniform() -> None:
    bits = np.unpackbits(random_uint32(20_000, 9, 0, 0).view(np.uint8))
    # 640 000 fair bits: 5 standard deviations of their mean
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / bits.size**0.5


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_the_share_of_dropped_elements_is_the_rate(rate: float, backend: object) -> None:
    n = 20_000
    x = backend.asarray(np.ones((n // 100, 100), np.float32))  # type: ignore[attr-defined]
    out = backend.to_numpy(backend.dropout(x, rate, 11, 0, backend.asarray(np.array([4, 0]))))  # type: ignore[attr-defined]
    dropped = out == 0
    assert abs(dropped.mean() - rate) <= 5 * (rate * (1 - rate) / n) ** 0.5
    assert (out[~dropped] == np.float32(1 / (1 - rate))).all()  # the expected value is kept


def test_thresholds() -> None:
    assert keep_threshold(0.5) == 2**31
    assert keep_threshold(0.25) == 3 * 2**30
    assert keep_threshold(0.0) == 2**32 - 1


def test_each_layer_and_each_step_has_its_own_mask(rng: np.random.Generator) -> None:
    model = gb.MLP([4, 40, 40, 3], "identity", device="cpu", dropout=0.5)
    step = model.step(6, gb.SGD(1e-9), keep=True)
    step.names.array("X")[...] = rng.normal(size=(6, 4)).astype(np.float32)
    run, masks = step.compile(), []
    for _ in range(2):
        run()
        masks += [tuple((step.names.array(name) == 0).ravel()) for name in ("r_1", "r_2")]
    assert len(set(masks)) == 4
