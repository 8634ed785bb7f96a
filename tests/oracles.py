"""mergekit 0.1.5 and fusion-bench as oracles, and random merges to compare with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from checkpoints import load_model
from hypothesis import strategies as st
from inputs import generator, group
from torch import Tensor

from resm_kernels.engine import merge_checkpoints
from resm_kernels.masks import unpacked
from resm_kernels.methods import tensor_key
from resm_kernels.ops import random_mask


def fusion_bench(module: str) -> Any:
    return pytest.importorskip(f"fusion_bench.method.{module}", reason="fusion-bench is the oracle")


def mergekit(
    base: Tensor | None,
    experts: Sequence[Tensor],
    method: str,
    parameters: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """mergekit's result; it computes norms and angles in `dtype` too."""
    api = pytest.importorskip("mergekit.merge_methods", reason="mergekit is the oracle")
    tensors, base_index = (experts, None) if base is None else ([base, *experts], 0)
    merged: Tensor = api.merge_tensors(
        tensors, method, parameters=parameters, base_index=base_index, dtype=dtype, out_dtype=out_dtype
    )
    return merged


def mergekit_folder(recipe: dict[str, Any], out: Path, **options: Any) -> dict[str, Tensor]:
    """The tensors of mergekit's merge of a recipe, which it writes to `out`."""
    pytest.importorskip("mergekit", reason="mergekit is the oracle")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    config = MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(recipe)))
    run_merge(config, str(out), MergeOptions(quiet=True, write_model_card=False, **options))
    return load_model(out)


def assert_merged_as_by_mergekit(recipe: dict[str, Any], root: Path, **tolerances: float) -> list[dict[str, Any]]:
    """Merge to `out` and, with mergekit, to `mergekit`; assert that all tensors agree, and return both configs."""
    folders = [root / "out", root / "mergekit"]
    merge_checkpoints(recipe, folders[0], overwrite=True)
    shutil.rmtree(folders[1], ignore_errors=True)
    expected = mergekit_folder(recipe, folders[1], copy_tokenizer=False)
    torch.testing.assert_close(load_model(folders[0]), expected, **tolerances)  # an error names the tensor
    return [json.loads((folder / "config.json").read_text()) for folder in folders]


@st.composite
def groups(
    draw: Callable[[st.SearchStrategy[Any]], Any],
    *shapes: tuple[int, ...],
    n_experts: tuple[int, int] = (1, 4),
    kinds: Sequence[str] = ("weights",),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
) -> tuple[Tensor, list[Tensor]]:
    """A base and from `n_experts[0]` to `n_experts[1]` experts, all of one dtype."""
    shape, kind, dtype = draw(st.tuples(*map(st.sampled_from, (shapes, kinds, dtypes))))
    return group(shape, draw(st.integers(*n_experts)), kind, base_dtype=dtype, seed=draw(st.integers(0, 10**6)))


SparseMerge = tuple[Tensor, list[Tensor], dict[str, Any]]
SHAPES = ((1,), (3,), (7, 5), (33, 17), (2, 3, 19))


@st.composite
def sparse_merges(
    draw: Callable[[st.SearchStrategy[Any]], Any],
    *shapes: tuple[int, ...],
    kinds: Sequence[str] = ("weights",),
    **shares: Sequence[float],
) -> SparseMerge:
    """A base, experts, and the parameters of a sparsifying method under mergekit's names.

    Args:
        shares: Parameters that are drawn for each expert, and the values to draw from.
    """
    base, experts = draw(groups(*(shapes or SHAPES), kinds=kinds))
    seed, rescale = draw(st.integers(0, 10**6)), draw(st.booleans())
    weight = (torch.rand(len(experts), generator=generator(seed)) * 2 + 0.1).tolist()
    if not rescale:  # Votes may cancel, because nothing is rounded.
        weight = [w * (-1) ** (t + seed) for t, w in enumerate(weight)]
    normalize, scale = draw(st.booleans()), draw(st.floats(-2.0, 2.0))
    drawn = {name: [draw(st.sampled_from(values)) for _ in experts] for name, values in shares.items()}
    return base, experts, {"weight": weight, "normalize": normalize, "rescale": rescale, "lambda": scale} | drawn


def our_keywords(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"lambda_" if key == "lambda" else key: value for key, value in parameters.items()}


def mergekit_with_our_masks(
    method: str, base: Tensor, experts: Sequence[Tensor], epsilon: float = 0.0, **parameters: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """mergekit's result with our mask in place of every draw, these masks, and the probabilities that it asked for."""
    density = parameters["density"]
    drawn = random_mask(base, experts, density, epsilon, seed=tensor_key(0, ""))
    masks = [unpacked(mask, base.shape) for mask in drawn]
    # mergekit draws only where density is below 1, and for DELLA only where it is above 0 too.
    remaining = [m for m, d in zip(masks, density, strict=True) if d < 1 and (d > 0 or not epsilon)]
    requested = []

    def draw(probabilities: Tensor) -> Tensor:
        requested.append(probabilities.reshape(base.shape))
        return remaining.pop(0).to(probabilities.dtype).reshape(probabilities.shape)

    if epsilon:
        parameters["epsilon"] = epsilon
    with mock.patch.object(torch, "bernoulli", draw):
        merged = mergekit(base, experts, method, parameters, out_dtype=base.dtype)
    assert not remaining
    return merged, masks, requested


def assert_near(merged: Tensor, expected: Tensor, inputs: Sequence[Tensor], bound: float) -> None:
    """Assert that the two differ by at most `bound` times the sum of the inputs' magnitudes."""
    size = sum(t.double().abs() for t in inputs)
    assert merged.shape == expected.shape
    assert bool(((merged.double() - expected.double()).abs() <= bound * size).all())


def assert_agrees(
    merged: Tensor, expected: Tensor, base: Tensor, terms: Sequence[Tensor], parameters: dict[str, Any], elects: bool
) -> None:
    """Assert equality without `rescale`; with it, agreement within rounding where the votes do not cancel.

    mergekit's L1 norms are sums of N numbers in fp32, so that each factor has a relative error of up to N·2⁻²⁴.

    Args:
        terms: w_t·r_t·δ_t in float64.
    """
    if not parameters.get("rescale", False):
        assert torch.equal(merged, expected)
        return
    share = (base.numel() + 8) * 2.0**-24
    size = sum((t.abs() for t in terms), torch.zeros(base.shape, dtype=torch.float64))
    votes = sum(terms, torch.zeros(base.shape, dtype=torch.float64)).abs()
    decided = (votes > 2 * share * size) | (size == 0) if elects else torch.ones(base.shape, dtype=torch.bool)
    divisor = min(1.0, *map(abs, parameters["weight"])) if parameters["normalize"] else 1.0
    bound = share * (base.double().abs() + 2 * abs(parameters["lambda"]) * size / divisor)
    rounding = torch.finfo(base.dtype).eps * expected.double().abs() if base.dtype != torch.float32 else 0.0
    assert bool(((merged.double() - expected.double()).abs() <= bound + rounding)[decided].all())


def terms_of(base: Tensor, experts: Sequence[Tensor], masks: Sequence[Tensor], weight: Sequence[float]) -> list[Tensor]:
    """w_t·r_t·δ_t in float64 with r_t restoring L1 norms."""
    terms = []
    for expert, mask, w in zip(experts, masks, weight, strict=True):
        delta = expert.float().double() - base.float().double()
        sparse = torch.where(mask, delta, 0.0)
        before, after = float(delta.abs().sum()), float(sparse.abs().sum())
        terms.append(w * sparse * (before / after if before >= 1e-7 and after >= 1e-7 else 1.0))
    return terms
