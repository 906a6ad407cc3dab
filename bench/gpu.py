"""Time every fused kernel and whole training steps on a GPU, against its copy bandwidth, the products alone and the peers.

    python bench/gpu.py                       # everything, in float32 and bfloat16
    python bench/gpu.py --quick               # fewer sizes and rounds
    python bench/gpu.py --suite steps --dtype float32,tf32 --out steps.json

Nothing that gives a wrong result is given a time. The report is a JSON file, by default in ``bench/results``; ``schema`` in
it is the version of its shape. Ctrl-C keeps what was measured so far.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
from pathlib import Path
from typing import Any

from gpubackprop.backends.diagnosis import cuda_problem

SCHEMA = 1
SUITES = ("kernels", "steps")
DTYPES = ("float32", "float64", "float16", "bfloat16", "tf32")
OURS = ("eager", "captured", "K steps per launch")
RESULTS = Path(__file__).parent / "results"


def main(argv: list[str] | None = None) -> int:
    """Run the suites that are asked for; return the exit code: 1 if a kernel or step is wrong, 2 without a GPU."""
    options = parse(argv)
    if problem := cuda_problem(options.device):
        print(f"no GPU to measure: {problem}", file=sys.stderr)
        return 2
    import cupy

    with cupy.cuda.Device(options.device):
        report = measure_all(options)
    out = options.out
    if out is None and not options.dry:
        gpu = re.sub(r"[^a-z0-9]+", "-", report["environment"]["gpu"].lower()).strip("-")
        out = RESULTS / f"{gpu}-{datetime.date.today().isoformat()}.json"
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"\nwritten to {out}")
    wrong = [row for row in report["kernels"] if "error" in row]
    wrong += [row for row in report["steps"] if "error" in row or set(row["losses"]) & set(row["left_out"]) & set(OURS)]
    return 1 if wrong else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; lists are given with commas."""

    def listed(allowed: tuple[str, ...]) -> Any:
        def split(text: str) -> list[str]:
            for name in text.split(","):
                if name not in allowed:
                    raise argparse.ArgumentTypeError(f"unknown {name!r}; choose from {', '.join(allowed)}")
            return text.split(",")

        return split

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, to see that it runs: its times mean nothing")
    parser.add_argument("--dtype", type=listed(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--suite", type=listed(SUITES), default=list(SUITES))
    parser.add_argument("--device", type=int, default=0, help="the number of the GPU")
    parser.add_argument("--rounds", type=int, help="samples of each time: 25, with --quick 9")
    parser.add_argument("--out", type=Path, help="the JSON file")
    return parser.parse_args(argv)


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    """Return the report of all suites, and print its tables."""
    import cupy
    from gpu_device import clocks, copy_bandwidth, environment, epilogues

    import gpubackprop as gb

    rounds = options.rounds or (2 if options.dry else 9 if options.quick else 25)
    seconds = 0.0 if options.dry else 0.005
    backend = gb.get_backend(f"cuda:{options.device}")
    stream = cupy.cuda.Stream(non_blocking=True)
    report: dict[str, Any] = {
        "schema": SCHEMA, "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "dry": options.dry, "quick": options.quick, "rounds": rounds, "interrupted": False,
        "environment": environment(backend), "kernels": [], "steps": [], "left_out": {},
    }  # fmt: skip
    e = report["environment"]
    print(f"{e['gpu']}, driver for CUDA {e['cuda_driver']}, cuBLAS {e['cublas']}, commit {(e['commit'] or '?')[:12]}")
    if options.dry:
        print("dry run: these times mean nothing")
    try:
        report["copy"] = copy_bandwidth(stream, rounds, seconds, dry=options.dry)
        speeds = ", ".join(
            f"{name} {report['copy'][name]['bytes_per_second'] / 1e9:.1f}" for name in ("kernel", "memcpy")
        )
        print(f"copy bandwidth, read + written: {report['copy']['bytes_per_second'] / 1e9:.1f} GB/s ({speeds})")
        for dtype in options.dtype:
            run_dtype(options, dtype, backend, stream, report, rounds, seconds)
    except KeyboardInterrupt:
        report["interrupted"] = True
        print("\ninterrupted: what follows is missing", file=sys.stderr)
    report["epilogues"] = epilogues(backend)
    report["environment"]["afterwards"] = clocks(options.device)
    for name, reason in report["left_out"].items():
        print(f"\nleft out: {name}: {reason}")
    return report


def run_dtype(
    options: argparse.Namespace,
    dtype: str,
    backend: Any,
    stream: Any,
    report: dict[str, Any],
    rounds: int,
    seconds: float,
) -> None:
    """Add the rows of one dtype to the report."""
    import gpu_tables
    from gpu_kernel_times import release, time_kernel
    from gpu_kernels import cases
    from gpu_peers import peers
    from gpu_steps import CASES, DRY_CASES, ComparisonError, make_problem, time_step

    import gpubackprop as gb

    size = "quick" if options.quick else "full"
    if ("float32" if dtype == "tf32" else dtype) not in backend.dtypes:
        report["left_out"][dtype] = f"{backend.device} computes in {', '.join(backend.dtypes)}"
        return
    if "kernels" in options.suite and dtype != "tf32":  # no kernel but the products knows TF32
        gpu_tables.kernel_heading(dtype)
        for case in cases(backend, dtype, size, dry=options.dry):
            bandwidth = report["copy"]["bytes_per_second"]
            try:
                row = time_kernel(backend, case, stream, bandwidth, rounds, seconds, dry=options.dry)
            except MemoryError as error:
                report["left_out"][f"{case.name} {case.shape} {dtype}"] = str(error)
                continue
            finally:
                release()
            row["dtype"] = dtype
            report["kernels"].append(row)
            gpu_tables.kernel_row(row)
    if "steps" in options.suite:
        precise = gb.get_backend(backend.device, matmul_precision="tf32") if dtype == "tf32" else backend
        for sizes, batch in DRY_CASES if options.dry else CASES[size]:
            try:
                row = time_step(precise, make_problem(sizes, batch, dtype), stream, peers, rounds, seconds)
            except (MemoryError, ComparisonError) as error:
                report["left_out"][f"{sizes} batch {batch} {dtype}"] = str(error)
                continue
            finally:
                release()
            report["steps"].append(row)
            gpu_tables.step_table(row)


if __name__ == "__main__":
    sys.exit(main())
