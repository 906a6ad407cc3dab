"""A case measured in fresh processes, each with its own number of threads and with arrays at other addresses.

    python -P instance.py JSON

measures one case and prints its samples as JSON; the JSON given names the case, the settings, the number of threads, whether to
scatter the arrays, and whether the base takes part twice.
"""

from __future__ import annotations

import json
import random
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from gpubackprop.bench import threads

if TYPE_CHECKING:
    from gpubackprop.bench.case import Case, Row, Settings

MOST_PADDING = 4096  # bytes of the environment, which lies above the stack
BLOCKS, LARGEST_BLOCK = 64, 1 << 16  # bytes of what lies between the arrays


def in_instances(case: Case, settings: Settings) -> Row:
    """Measure a case in ``settings.instances`` fresh processes, one after another; return its row."""
    from gpubackprop.bench.case import row_of
    from gpubackprop.bench.suites import in_new_process

    twin = settings.instances > 1
    given = json.dumps(
        {"key": case.key, "settings": asdict(settings), "threads": case.threads or settings.threads, "twin": twin}
    )
    padding = ["." * random.randrange(MOST_PADDING) if twin else "" for _ in range(settings.instances)]
    return row_of([in_new_process(__file__, given, GPUBACKPROP_BENCH_PADDING=text) for text in padding])


def main(text: str) -> None:
    """Measure a case and print its samples."""
    given = json.loads(text)
    threads.limit(given["threads"])  # before the libraries are loaded

    from gpubackprop.bench.case import Settings, pause_of, sampled

    options, key = given["settings"], tuple(given["key"])
    pause = pause_of(given["threads"], idle=not (options["quick"] or options["dry"]))
    options.update(libraries=tuple(options["libraries"]), dtypes=tuple(options["dtypes"]))
    settings = Settings(**{**options, "threads": given["threads"], "pause": pause})
    between = scattered() if given["twin"] else []
    twin = case_of(key, replace(settings, libraries=())) if given["twin"] else None
    with threads.pinned(given["threads"]) if key[1] == "cpu" else nullcontext():
        raw = sampled(case_of(key, settings), settings, twin)
    del between
    print(json.dumps(raw))


def case_of(key: tuple[Any, ...], settings: Settings) -> Case:
    """Return the case with a key."""
    from gpubackprop.bench.devices import device_of
    from gpubackprop.bench.suites import cases_of

    suite, device, dtype, _ = key
    cases = cases_of(suite, device_of(device, settings.threads), dtype, settings)
    return next(case for case in cases if case.key == key)


def scattered() -> list[bytearray]:
    """Return blocks of random sizes, with gaps as large between them: arrays made later lie at random addresses."""
    blocks = [bytearray(random.randrange(1, LARGEST_BLOCK)) for _ in range(2 * BLOCKS)]
    return blocks[::2]


if __name__ == "__main__":
    main(sys.argv[1])
