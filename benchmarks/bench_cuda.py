"""aggregate on a GPU at 3 experts of 4096 × 14336 bf16, against the device's own copy in the same run.

python benchmarks/bench_cuda.py --json benchmarks/results/gpu.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import resm_kernels
from resm_kernels.ops import aggregate

SHAPE, N_EXPERTS, ROUNDS = (4096, 14336), 3, 50


def milliseconds(function: Callable[[], object]) -> float:
    """Median over ROUNDS calls by device events, after three that are not counted."""
    times = []
    for i in range(ROUNDS + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU here: nothing to measure")
    torch.manual_seed(0)
    base = (torch.randn(SHAPE, device="cuda") * 0.02).bfloat16()
    experts = [(base.float() + torch.randn(SHAPE, device="cuda") * 1e-3).bfloat16() for _ in range(N_EXPERTS)]
    weights = [1.0] * N_EXPERTS
    sources, copies = [base, *experts], [torch.empty_like(base) for _ in range(1 + N_EXPERTS)]
    copy_ms = milliseconds(lambda: [c.copy_(s) for c, s in zip(copies, sources, strict=True)])
    copy_rate = 2 * (1 + N_EXPERTS) * base.nbytes / copy_ms / 1e9
    rows = [{"name": "copy", "ms": copy_ms, "TB/s": copy_rate, "share of copy": 1.0}]
    for rule in ("sum", "ties"):
        thresholds = [1e-3] * N_EXPERTS if rule == "ties" else None

        def run(rule: str = rule, thresholds: list[float] | None = thresholds) -> torch.Tensor:
            return aggregate(base, experts, weights, rule=rule, thresholds=thresholds, check_finite=False)

        on_cpu = aggregate(base[:64].cpu(), [e[:64].cpu() for e in experts], weights, rule=rule, thresholds=thresholds)
        assert torch.equal(run()[:64].cpu(), on_cpu), f"{rule}: differs from the CPU"
        ms = milliseconds(run)
        rate = (2 + N_EXPERTS) * base.nbytes / ms / 1e9
        rows.append({"name": f"aggregate {rule}", "ms": ms, "TB/s": rate, "share of copy": rate / copy_rate})
    for row in rows:
        print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{v:<16}" for k, v in row.items()))
    if arguments.json:
        facts = resm_kernels.backends()
        record = {"gpu": facts["gpu"], "torch": facts["torch"], "rows": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
