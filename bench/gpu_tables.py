"""The report of the GPU as tables of at most 100 columns."""

from __future__ import annotations

from typing import Any


def kernel_heading(dtype: str) -> None:
    """Print the head of the table of kernels."""
    print(f"\nKernels, {dtype}: device time of one operation in a graph, arrays from memory, not from the cache.")
    print("share: of the copy bandwidth; equal: of the speed of a copy of as many bytes; ~: may be chance")
    print(f"{'kernel':34s} {'shape':>10s} {'us':>9s} {'IQR':>7s} {'GB/s':>6s} {'share':>6s} {'equal':>6s} plain CuPy")


def kernel_row(row: dict[str, Any]) -> None:
    """Print one kernel; where it is wrong, what is wrong."""
    head = f"{row['kernel']:34s} {'x'.join(map(str, row['shape'])):>10s}"
    if "error" in row:
        print(f"{head} WRONG: {row['error']}")
        return
    t = row["times"]["fused"]["device_seconds"]
    line = f"{head} {t['median'] * 1e6:9.2f} {(t['q3'] - t['q1']) * 1e6:7.2f} {row['bytes_per_second'] / 1e9:6.0f}"
    line += f" {row['share_of_copy_bandwidth']:6.1%} {row['share_of_equal_copy']['median']:6.1%}"
    if "unfused_over_fused" in row:
        line += f" {times(row['unfused_over_fused'])}{'' if row['unfused_captured'] else ' eager'}"
    print(line)
    if "unfused" in row["left_out"]:
        print(f"    plain CuPy has no time: {row['left_out']['unfused']}")


def step_table(row: dict[str, Any]) -> None:
    """Print the contestants of one step."""
    layers = "-".join(map(str, row["layers"]))
    print(f"\nStep {layers}, batch {row['batch']}, {row['dtype']}, Adam; K = {row['steps_per_launch']}")
    print(f"losses compared after {row['compared_steps']} steps: {row['first_loss']:.4f} -> {row['expected_loss']:.4f}")
    print("share: the products alone over this; ours: this over our best; w: wall time; ~: may be chance")
    print(
        f"{'per step':30s} {'device us':>10s} {'IQR':>8s} {'wall us':>10s} {'IQR':>8s} {'share':>7s} {'ours':>8s} "
        f"{'setup s':>8s}"
    )
    for name, found in row["times"].items():
        share, setup = row["share_of_products"][name], row["setup_seconds"][name]
        mark = "w" if share["clock"] == "wall" else " "
        over = times(row["over_ours"][name]) if "over_ours" in row else ""
        print(
            f"{name:30s} {microseconds(found['device_seconds'])} {microseconds(found['wall_seconds'])} "
            f"{share['median']:6.1%}{mark} {over:>8s} {'' if setup is None else f'{setup:.2f}':>8s}"
        )
    for name, reason in row["left_out"].items():
        print(f"  {name}: {reason}"[:100])


def microseconds(found: dict[str, float] | None) -> str:
    """Return median and interquartile range in 19 columns."""
    if found is None:
        return f"{'-':>10s} {'':8s}"
    return f"{found['median'] * 1e6:10.1f} {(found['q3'] - found['q1']) * 1e6:8.1f}"


def times(found: dict[str, Any]) -> str:
    """Return a ratio, with ``~`` where it may as well be 1."""
    return f"{found['median']:.2f}x{' ' if found['significant'] else '~'}"
