"""Merges by every method have the bits that are recorded in merge_bits.json, whatever is rewritten inside.

Methods whose arithmetic is this library's kernels alone give the same bits on every processor. The others call torch's
products and functions, and are compared on the kind of machine that the record was made on.

`python tests/test_merge_bits.py` records results that have changed on purpose.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import bits, call_of, group, random_statistics
from torch import Tensor

from resm_kernels import _extension, merge, methods, ops, truncated_svd

RECORD = Path(__file__).with_name("merge_bits.json")
SHAPES = ((96, 64), (64, 96), (31, 130), (1000,))
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "breadcrumbs": ({"density": 0.6, "gamma": 0.1},),
    "dare_linear": ({"density": 0.5}, {"density": 0.5, "rescale_by": "probability"}),
    "dare_ties": ({"density": 0.5},),
    "della": ({"density": 0.5, "epsilon": 0.2},),
    "resm": (
        {"beta": 1.0},
        {"beta": 1.0, "accuracy": 0.0},
        {"beta": 1.0, "granularity": "row"},
        {"beta": 1.0, "rank_rule": "energy"},
        {"beta": 1.0, "rank_rule": "effective_rank"},
        {"outlier_clip": True, "beta": -0.5},
        {"beta": 1.0, "decomposition": "exact"},
        {"beta": 1.0, "decomposition": "gram"},
        {"beta": 1.0, "decomposition": "randomized", "rank_rule": "fixed", "rank": 4, "accuracy": 1e-2},
    ),
    "ties": ({"density": 0.2}, {"density": [0.2, 0.9], "normalize": False, "weight": [0.5, 1.5]}),
}
"""Parameters that differ from a method's defaults."""


def machine() -> dict[str, Any]:
    """What the bits of matrix products depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    models = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    isa = _extension.native.build_facts()["isa"] if _extension.native is not None else "reference"
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__.split("+")[0], "cpu": models[:1], "capability": capability, "isa": isa}


def digest(*tensors: Tensor) -> str:
    hasher = hashlib.sha256()
    for tensor in tensors:
        hasher.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        hasher.update(bits(tensor).numpy().tobytes())
    return hasher.hexdigest()[:16]


def merges(method: str) -> Iterator[tuple[str, str]]:
    """A key and a digest for each merge by the method."""
    n_experts, required = call_of(method)
    for options in ({}, *OPTIONS.get(method, ())):
        for shape in SHAPES:
            for dtype in DTYPES:
                base, experts = group(shape, n_experts, base_dtype=dtype)
                if methods.get(method).statistics:
                    required["statistics"] = random_statistics(method, shape, n_experts)
                merged = merge(
                    base, experts, method, name="model.layers.0.q_proj.weight", seed=3, **required, **options
                )
                yield f"{method} {json.dumps(options)} {list(shape)} {dtype}", digest(merged)


def products() -> Iterator[tuple[str, str]]:
    """The same for what methods do not show: statistics and truncated decompositions."""
    for method in ("resm", "tsvm"):
        base, experts = group((520, 300), 3, base_dtype=torch.bfloat16)
        yield f"{method} [520, 300]", digest(merge(base, experts, method))
    for dtype in DTYPES:
        base, experts = group((120, 80), 3, base_dtype=dtype)
        stats = ops.delta_stats(base, experts, eps_rel=0.1, kappa=2.5, histogram=True)
        yield f"delta_stats {dtype}", digest(*(t for t in vars(stats).values() if isinstance(t, Tensor)))
        decomposition = truncated_svd(base, experts[0], rank=7, accuracy=1e-2)
        yield f"truncated_svd {dtype}", digest(*decomposition[:3])


def record() -> dict[str, Any]:
    digests = {key: value for method in methods.names() for key, value in merges(method)}
    return {"machine": machine(), "digests": digests | dict(products())}


PORTABLE = {
    *("linear", "task_arithmetic", "passthrough", "sce", "ties", "breadcrumbs", "breadcrumbs_ties"),
    *("dare_linear", "dare_ties", "della", "della_linear"),
}
"""Methods whose arithmetic is this library's kernels alone: the same bits on every processor."""


def recorded(needs_the_machine: bool) -> dict[str, str]:
    content: dict[str, Any] = json.loads(RECORD.read_text())
    if needs_the_machine and (here := machine()) != content["machine"]:
        pytest.skip(f"recorded on {content['machine']}, this is {here}: matrix products may have other bits")
    digests: dict[str, str] = content["digests"]
    return digests


@pytest.mark.parametrize("method", methods.names())
def test_merges_have_the_recorded_bits(method: str) -> None:
    expected = recorded(method not in PORTABLE)
    digests = dict(merges(method))
    assert digests == {key: expected.get(key) for key in digests}


def test_statistics_and_decompositions_have_the_recorded_bits() -> None:
    expected = recorded(True)
    digests = dict(products())
    assert digests == {key: expected[key] for key in digests}


if __name__ == "__main__":
    content = record()
    RECORD.write_text(json.dumps(content, indent=1) + "\n")
    sys.stdout.write(f"{RECORD}: {len(content['digests'])} digests\n")
