"""Stages that are kept between merges: the same bits, what is computed again, and the bound on memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from inputs import bits, call_of, group, random_statistics

from resm_kernels import merge, methods
from resm_kernels.methods.resm import resm
from resm_kernels.ops.kept_moments import kept_moments
from resm_kernels.ops.magnitude_threshold import magnitude_threshold
from resm_kernels.ops.random_mask import random_mask
from resm_kernels.stages import StageStore, is_keeping, keeping, kept, kept_each

MIB = 1 << 20


@pytest.mark.parametrize("method", methods.names())
@pytest.mark.parametrize("shape", [(48, 32), (700,)])
def test_merges_with_kept_stages_have_the_same_bits(method: str, shape: tuple[int, ...]) -> None:
    """Twice with each of two weights, so that stages are both kept and found."""
    n_experts, required = call_of(method)
    base, experts = group(shape, n_experts, base_dtype=torch.bfloat16)
    if methods.get(method).statistics:
        required["statistics"] = random_statistics(method, shape, n_experts)
    store = StageStore(64 * MIB)
    names = {p.name for p in methods.get(method).parameters}
    changes: list[dict[str, Any]] = [{}, {"weight": 0.5}] if "weight" in names else [{}]
    if "density" in names:
        changes = [c | {"density": d} for c, d in itertools.product(changes, (0.5, 0.7))]
    for change in changes * 2:
        expected = merge(base, experts, method, name="a.weight", seed=3, **required, **change)
        with keeping(store, "a.weight", [base, *experts]):
            got = merge(base, experts, method, name="a.weight", seed=3, **required, **change)
        assert torch.equal(bits(got), bits(expected)), change


@pytest.mark.parametrize(
    "changes",
    [
        [{"beta": 1.0}, {"beta": 0.5}, {"weight": [1.0, 2.0, 0.5]}, {"lambda_": 0.3}],
        [{"rank_rule": "energy", "energy": e} for e in (0.5, 0.9)],
        [{"rank_rule": "interference", "weight": w} for w in (1.0, [3.0, 0.1, 0.1])],
        [{"rank_rule": "fixed", "rank": r} for r in (1, 4)],
        [{"granularity": "row", "beta": b} for b in (0.5, 1.0)],
        [{"outlier_clip": True, "kappa": k} for k in (1.0, 2.0)],
        [{"gamma": g} for g in (0.0, 1.0)],
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_resm_depends_on_all_its_parameters_with_kept_stages(changes: list[dict[str, Any]], dtype: torch.dtype) -> None:
    base, experts = group((60, 40), 3, base_dtype=dtype)
    store = StageStore(64 * MIB)
    for change in changes * 2:
        expected = merge(base, experts, "resm", **change)
        with keeping(store, "w", [base, *experts]):
            assert torch.equal(merge(base, experts, "resm", **change), expected), change


def test_a_new_weight_of_resm_decomposes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = group((60, 40), 3)
    store, calls = StageStore(64 * MIB), []
    import resm_kernels.methods.resm as module
    from resm_kernels.linalg import subspaces

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return subspaces(*args, **kwargs)

    monkeypatch.setattr(module, "subspaces", counted)
    with keeping(store, "w", [base, *experts]):
        for beta, lambda_, weight in itertools.product((0.0, 1.0), (0.5, 1.0), (1.0, 2.0)):
            resm(base, experts, weight=[weight, 1, 1], beta=beta, lambda_=lambda_, out_dtype=None)
        assert len(calls) == 1
        resm(base, experts, rank_rule="fixed", rank=2, weight=[1.0] * 3, out_dtype=None)
    assert len(calls) == 2


def test_thresholds_are_selected_for_changed_densities_alone() -> None:
    base, experts = group((500,), 3)
    expected = magnitude_threshold(base, experts, [100, 200, 300])
    store = StageStore(MIB)
    with keeping(store, "w", [base, *experts]):
        magnitude_threshold(base, experts, [100, 50, 300])
        assert (store.hits, store.misses) == (0, 3)
        assert torch.equal(magnitude_threshold(base, experts, [100, 200, 300]), expected)
        assert (store.hits, store.misses) == (2, 4)
        # The same two tensors are the same task vector, at whichever place.
        assert torch.equal(magnitude_threshold(base, experts[::-1], [300, 200, 100]), expected.flip(0))
        assert (store.hits, store.misses) == (5, 4)


def test_thresholds_of_experts_in_several_dtypes_are_selected_in_the_widest() -> None:
    base, experts = group((500,), 2, expert_dtypes=[torch.float32, torch.float64])
    expected = [magnitude_threshold(base, experts, k) for k in ([30, 40], [30, 50])]
    store = StageStore(MIB)
    with keeping(store, "w", [base, *experts]):
        got = [magnitude_threshold(base, experts, k) for k in ([30, 40], [30, 50])]
    assert all(map(torch.equal, got, expected))


def test_what_is_no_input_is_not_kept() -> None:
    base, experts = group((500,), 2)
    store = StageStore(MIB)
    with keeping(store, "w", [base, *experts]):
        changed = base + 1
        first = magnitude_threshold(changed, experts, 10)
        changed += 1
        assert not torch.equal(magnitude_threshold(changed, experts, 10), first)
    assert store.nbytes == 0


def test_moments_of_kept_masks_are_kept_with_them() -> None:
    base, experts = group((1000,), 2)
    store = StageStore(MIB)
    with keeping(store, "w", [base, *experts]):
        masks = [random_mask(base, experts, d, seed=5) for d in (0.5, 0.6, 0.5)]
        assert masks[0] is masks[2]
        moments = [kept_moments(base, experts, masks=m) for m in masks]
        assert store.hits == 2
        own = [m.clone() for m in masks[0]]
        assert torch.equal(kept_moments(base, experts, masks=own)[1], moments[0][1])
        assert store.hits == 2
    assert not torch.equal(moments[0].kept_sum_abs, moments[1].kept_sum_abs)
    assert torch.equal(moments[0].kept_sum_abs, moments[2].kept_sum_abs)


def test_inputs_under_another_key_are_other_inputs() -> None:
    store = StageStore(MIB)
    thresholds = []
    for seed in (0, 1):
        base, experts = group((500,), 2, seed=seed)
        with keeping(store, seed, [base, *experts]):
            thresholds.append(magnitude_threshold(base, experts, 10))
    assert store.hits == 0 and not torch.equal(*thresholds)


def test_nothing_is_kept_outside_of_the_context() -> None:
    base, experts = group((500,), 2)
    store = StageStore(MIB)
    assert not is_keeping()
    with pytest.raises(RuntimeError), keeping(store, "w", [base, *experts]):
        assert is_keeping()
        raise RuntimeError
    assert not is_keeping()
    assert kept("stage", (base,), lambda: 7) == 7 and store.misses == 0
    assert torch.equal(*kept_each("stage", base, experts, (1, 2), lambda chosen: (torch.ones(2),) * 2))


def block(mebibytes: float) -> torch.Tensor:
    return torch.zeros(int(mebibytes * MIB), dtype=torch.uint8)


def test_the_bound_holds_and_what_saves_most_stays() -> None:
    store = StageStore(10 * MIB)
    store.begin_round()
    store.add("slow", block(4), seconds=8.0)
    store.add("fast", block(4), seconds=1.0)
    store.add("medium", block(4), seconds=2.0)  # takes the room of "fast"
    assert store.nbytes == 8 * MIB and store.find("fast") is None
    store.add("fast", block(4), seconds=1.0)  # finds none
    assert store.find("fast") is None and store.find("medium") and store.find("slow")
    store.add("huge", block(11), seconds=1e9)
    assert store.find("huge") is None and store.peak == 8 * MIB
    store.add("small", block(2), seconds=0.1)
    assert store.nbytes == 10 * MIB == store.peak


def test_results_that_were_not_used_for_a_round_go_first() -> None:
    store = StageStore(8 * MIB)
    store.begin_round()
    store.add("old", block(4), seconds=100.0)
    store.add("used", block(4), seconds=50.0)
    for _ in range(2):
        store.begin_round()
        assert store.find("used")
    store.add("new", block(4), seconds=1.0)
    assert store.find("old") is None and store.find("used") and store.find("new")


def test_a_model_beyond_the_bound_keeps_a_part_from_round_to_round() -> None:
    """With the order of last use alone, nothing would ever be found."""
    store = StageStore(5 * MIB)
    for _ in range(3):
        store.begin_round()
        store.hits = 0
        for name in range(10):
            store.get(name, lambda: block(1))
        assert store.nbytes <= store.limit
    assert store.hits >= 3


def test_a_result_that_is_there_is_not_stored_again() -> None:
    """Two equal experts have one stage, which is computed for both; a tensor that goes must not be known by its id."""
    store, first, second = StageStore(10 * MIB), block(4), block(4)
    store.add("stage", first, seconds=1.0)
    store.add("stage", second, seconds=1.0)
    assert store.nbytes == 4 * MIB and store.origin(first) == ("stage", 0) and store.origin(second) is None
    base, (expert,) = group((40,), 1)
    with keeping(store, "w", [base, expert, expert]):
        magnitude_threshold(base, [expert, expert], [4, 4])
    entries = [entry for entry in store._entries.values() if entry.value is not first]
    assert len(entries) == 1 and store.nbytes == 4 * MIB + entries[0].nbytes
    assert len(store._origins) == 1 + len(entries[0].value)


def test_memory_that_tensors_share_counts_once() -> None:
    store = StageStore(10 * MIB)
    whole = block(4)
    store.add("views", [whole[:10], whole[10:], {"more": whole}], seconds=1.0)
    assert store.nbytes == 4 * MIB
    store.clear()
    assert store.nbytes == 0 and store.find("views") is None
