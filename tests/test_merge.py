"""The front door: merge, merge_state_dicts, the registry of methods, and how parameters are checked."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from inputs import call_of, group, randn, random_statistics, same_bits
from torch import Tensor

import resm_kernels
from resm_kernels import NonFiniteError, merge, merge_state_dicts
from resm_kernels.methods import REQUIRED, Method, Parameter, get, names

AVERAGES = {"linear", "karcher", "passthrough", "nuslerp", "multislerp", "regmean", "regmean_plus", "fisher"}
"""Methods that need no base; nuslerp and multislerp merge task vectors if there is one."""


def test_registry_finds_methods_by_name_and_suggests_the_nearest() -> None:
    assert {"linear", "resm", "task_arithmetic", "ties", "tsvm"} < set(names()) and list(names()) == sorted(names())
    for name in names():
        method = get(name)
        assert isinstance(method, Method) and method.name == name
        assert method.title and method.reference.startswith("https://")
        assert method.needs_base == (name not in AVERAGES)
    message = rf"unknown merge method 'tie', did you mean 'ties'\?; known: {', '.join(names())}"
    with pytest.raises(ValueError, match=message):
        get("tie")
    with pytest.raises(ValueError, match=r"unknown merge method 'xyz'; known"):
        merge(torch.zeros(2), [torch.zeros(2)], "xyz")


# Every method with the parameters that it needs, and some also with parameters that choose another computation.
MERGES = [
    *((name, call_of(name)[1]) for name in names()),
    *(("breadcrumbs", {"density": 0.5}), ("ties", {"density": 0.2}), ("sce", {"select_topk": 0.5})),
    *(("model_stock", {"filter_wise": True}), ("nearswap", {"t": 1e-3}), ("nuslerp", {"nuslerp_flatten": False})),
    ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True, "weight": [0.2, 0.5]}),
]


@pytest.mark.parametrize(("name", "parameters"), MERGES, ids=str)
@pytest.mark.parametrize("shape", [(12, 10), (7,), (), (0,), (0, 4), (1,), (0, 3), (3, 0), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("out_dtype", [None, torch.float16], ids=str)
def test_every_method_merges_every_shape(
    name: str, parameters: dict[str, Any], shape: tuple[int, ...], out_dtype: torch.dtype | None
) -> None:
    n_experts = min(3, get(name).max_experts or 3)
    if get(name).statistics:
        parameters = parameters | {"statistics": random_statistics(name, shape, n_experts)}
    base, experts = group(shape, n_experts, base_dtype=torch.bfloat16, expert_dtypes=[torch.float32])
    for origin in [base] if get(name).needs_base else [base, None]:
        merged = merge(origin, experts, name, out_dtype=out_dtype, **parameters)
        assert merged.shape == shape and merged.dtype == (out_dtype or (experts[0] if origin is None else base).dtype)
        assert merged.is_contiguous() and bool(torch.isfinite(merged).all())
        assert all(merged.data_ptr() != t.data_ptr() for t in [base, *experts] if t.numel())
        # Experts may come as any sequence, and the method itself can be called in the same way.
        assert same_bits(merged, merge(origin, tuple(experts), name, out_dtype=out_dtype, **parameters))
        assert same_bits(merged, get(name)(origin, experts, out_dtype=out_dtype, **parameters))


@pytest.mark.parametrize(("name", "parameters"), [m for m in MERGES if get(m[0]).needs_base], ids=str)
@pytest.mark.parametrize("shape", [(500,), (25, 20)], ids=str)
def test_experts_without_changes_give_the_base(name: str, parameters: dict[str, Any], shape: tuple[int, ...]) -> None:
    base, _ = group(shape, 1, base_dtype=torch.bfloat16)
    n_experts = min(2, get(name).max_experts or 2)
    assert same_bits(merge(base, [base.clone()] * n_experts, name, **parameters), base)


@pytest.mark.parametrize("name", names())
def test_workspace_is_a_bound_that_grows_with_the_tensor(name: str) -> None:
    small, large = (get(name).workspace((n, n), 3) for n in (64, 4096))
    assert 0 < small < large


@pytest.mark.parametrize("name", names())
def test_tensors_that_do_not_fit_are_refused_by_name(name: str) -> None:
    n_experts, parameters = call_of(name)
    base, experts = group((6, 5), n_experts)
    last = n_experts - 1
    other = experts[last].mT
    with pytest.raises(ValueError, match=rf"experts\[{last}\]: got shape \[5, 6\], need \[6, 5\]"):
        merge(base, [*experts[:last], other], name, **parameters)
    with pytest.raises(TypeError, match=r"experts\[0\]: got dtype int64"):
        merge(base, [experts[0].long(), *experts[1:]], name, **parameters)
    with pytest.raises(ValueError, match="experts: got none"):
        merge(base, [], name, **parameters)
    with pytest.raises(ValueError, match="experts: got a tensor"):
        merge(base, experts[0], name, **parameters)
    with pytest.raises(ValueError, match=r"experts\[0\]: requires grad"):
        merge(base, [experts[0].clone().requires_grad_(), *experts[1:]], name, **parameters)
    experts[0][2, 2] = math.inf
    with pytest.raises(NonFiniteError, match=r"experts\[0\]: got 1 NaN or infinite"):
        merge(base, experts, name, **parameters)


@pytest.mark.parametrize("name", [n for n in names() if get(n).min_experts > 1 or get(n).max_experts])
def test_number_of_experts_is_checked(name: str) -> None:
    method, (n_experts, parameters) = get(name), call_of(name)
    base, experts = group((6, 5), n_experts + 1)
    wrong = experts if method.max_experts == n_experts else experts[: method.min_experts - 1]
    with pytest.raises(ValueError, match=rf"experts: got {len(wrong)}, but {name} merges (at least )?{n_experts}"):
        merge(base, wrong, name, **parameters)


def test_base_of_another_shape_than_linears_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        merge(torch.zeros(4), [torch.zeros(3), torch.zeros(3)], "linear")


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("breadcrumbs", {"density": 1.1}, "density: got 1.1, need a number from 0 to 1"),
    ("breadcrumbs", {"gamma": 1.1}, "gamma: got 1.1, need a number from 0 to 1"),
    ("dc_merge", {"smoothing": "averaging"}, "smoothing: got 'averaging', need one of none, average, linear"),
    ("dc_merge", {"rho": 0.5}, "rho: got 0.5, need a number of at least 1"),
    ("della_linear", {"density": 0.9}, "epsilon: got 0.15 with density 0.9, need density ± epsilon between 0 and 1"),
    ("knots", {"inner": "tie"}, "inner: got 'tie', need one of ties, sum, did you mean 'ties'"),
    ("multislerp", {"weight": [1, -1]}, "weight: sums to 0.*normalize_weights=False"),
    ("nearswap", {}, "t: missing; how far a weight may move"),
    ("nearswap", {"t": -1}, "t: got -1, need a number of at least 0"),
    ("ram", {"epsilon": -1}, "epsilon: got -1, need a number of at least 0"),
    ("resm", {"rank_rule": "fixed"}, "rank: missing; rank_rule 'fixed' needs"),
    ("resm", {"rank_rule": "sparse"}, r"rank_rule: got 'sparse', need one of .*did you mean 'sparsity'\?"),
    ("resm", {"rank": 0}, "rank: got 0, need a whole number of at least 1"),
    ("resm", {"k_min": 1.5}, "k_min: got 1.5, need a whole number"),
    ("resm", {"kappa": -1}, "kappa: got -1, need a number of at least 0"),
    ("resm", {"energy": 1.1}, "energy: got 1.1, need a number from 0 to 1"),
    ("resm", {"beta": math.nan}, "beta: got nan, need a number"),
    ("resm", {"granularity": "rows"}, "granularity: got 'rows', need one of layer, row"),
    ("resm", {"decomposition": "svd"}, "decomposition: got 'svd', need one of auto, gram, exact, randomized"),
    ("resm", {"outlier_clip": "maybe"}, "outlier_clip: got 'maybe', need true or false"),
    ("resm", {"weight": [1, 1, 1]}, "weight: got 3 values, need one for each of the 2 experts"),
    ("resm", {"gama": 1}, r"resm has no parameter 'gama', did you mean 'gamma'\?"),
    ("resmerge", {"rank": 0}, "rank: got 0, need a whole number of at least 1"),
    ("resmerge", {"beta_min": 2.0}, "beta_min: got 2, need at most beta_max, 1"),
    ("sce", {"select_topk": 1.1}, "select_topk: got 1.1, need a number from 0 to 1"),
    ("slerp", {}, "t: missing; how far to go from the base"),
    ("slerp", {"t": 0.5, "dot_threshold": 2}, "dot_threshold: got 2, need a number from 0 to 1"),
    *(("star", {"eta": bad}, "eta: got .*, need a number from 0 to 1") for bad in (-0.1, 1.1, "all")),
    ("svc", {"alpha": 0.0}, "alpha: got 0.0, need a number above 0"),
    ("svc", {"inner": "dc_merge", "inner_density": [0.1, 0.2]},
     r"inner_density: got \[0.1, 0.2\], need one value, as dc_merge has one for all"),
    ("svc", {"inner_density": 0.5}, "inner_density: task_arithmetic takes 'density' from recipes and ignores it"),
    ("svc", {"inner": "ties", "inner_density": 1.5}, "density: got 1.5, need a number from 0 to 1"),
    ("svc", {"inner": "tie"}, "inner: got 'tie', need one of .*did you mean 'ties'"),
    ("swudi", {"rank_rule": "ration"}, "rank_rule: got 'ration', need one of ratio.*did you mean 'ratio'"),
    ("swudi", {"rank_ratio": 1.5}, "rank_ratio: got 1.5, need a number from 0 to 1"),
    *(("ties", {"density": d}, "density: got .*, need a number from 0 to 1") for d in (-0.1, 1.1, math.nan, "many")),
    ("ties", {"statistics": [None, None]}, "statistics: got some, but ties merges weights alone; need none"),
    ("ties", {"densty": 0.2}, r"ties has no parameter 'densty', did you mean 'density'\?; it has weight"),
    ("ties", {"lamda_": 0.5}, r"ties has no parameter 'lamda_', did you mean 'lambda'\?"),
    ("linear", {"lambda_": 0.5}, "linear has no parameter 'lambda_'"),
    ("tsv_compress", {"rank": 2, "share": 0.5}, r"rank: got 2 and a share of 0\.5, need one of the two"),
    ("tsv_compress", {"rank": 0}, "rank: got 0, need a whole number of at least 1"),
    ("tsv_compress", {"share": 2}, "share: got 2, need a number from 0 to 1"),
    ("tsvm", {"beta": 0.0}, "tsvm has no parameter 'beta'"),
    ("wudi", {"steps": -1}, "steps: got -1, need a whole number of at least 0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "parameters", "message"), REFUSED, ids=str)
def test_wrong_parameters_are_refused_by_name(name: str, parameters: dict[str, Any], message: str) -> None:
    base, experts = group((8, 6), call_of(name)[0])
    with pytest.raises(ValueError, match=message):
        merge(base, experts, name, **parameters)


def test_lambda_is_passed_with_an_underscore() -> None:
    base, experts = group((6, 5), 2)
    with pytest.raises(TypeError, match="ties: pass 'lambda' as 'lambda_'"):
        merge(base, experts, "ties", **{"lambda": 0.5})


# Parameters.


def test_numbers_are_read_as_recipes_write_them() -> None:
    p = Parameter("x", float, 1.0, "a number", minimum=0.0, maximum=2.0)
    assert [p.validate(v) for v in (1, "1e-3", 0.5, "2")] == [1.0, 1e-3, 0.5, 2.0]
    for bad in (-0.1, 2.1, math.nan, math.inf, "many", None, True, [1], {}):
        with pytest.raises(ValueError, match=r"^x: got .*, need a number from 0 to 2$"):
            p.validate(bad)


def test_whole_numbers_booleans_and_choices() -> None:
    count = Parameter("k", int, 1, "a count", minimum=1)
    assert count.validate(3.0) == 3 and isinstance(count.validate(3.0), int) and count.validate("4") == 4
    for bad in (1.5, 0, "x", True):
        with pytest.raises(ValueError, match=r"^k: got .*, need a whole number of at least 1$"):
            count.validate(bad)
    flag = Parameter("f", bool, False, "a flag")
    assert [flag.validate(v) for v in (True, 0, 1.0, "yes", "False", "ON")] == [True, False, True, True, False, True]
    for wrong in (2, "maybe", None, 0.5):
        with pytest.raises(ValueError, match=r"^f: got .*, need true or false$"):
            flag.validate(wrong)
    choice = Parameter("c", ("layer", "row"), "layer", "a choice")
    assert choice.validate("row") == "row"
    with pytest.raises(ValueError, match=r"^c: got 'raw', need one of layer, row, did you mean 'row'\?$"):
        choice.validate("raw")
    with pytest.raises(ValueError, match=r"^c: got "):
        choice.validate(["row"])
    capped = Parameter("m", float, 1.0, "capped", maximum=1.0)
    with pytest.raises(ValueError, match=r"at most 1$"):
        capped.validate(2)


def test_none_is_allowed_only_as_a_default() -> None:
    assert Parameter("rank", int, None, "optional", minimum=1).validate(None) is None
    with pytest.raises(ValueError, match=r"^rank: got None"):
        Parameter("rank", int, 3, "not optional").validate(None)


def test_required_parameters_and_defaults() -> None:
    def function(base: Tensor, experts: list[Tensor], *, out_dtype: object, scales: list[float], on: bool) -> Tensor:
        return base * sum(scales) if on else base

    method = Method(
        name="scaled",
        title="Scaled",
        reference="https://example.org",
        needs_base=True,
        parameters=(
            Parameter("scales", float, REQUIRED, "one for each expert", per_expert=True),
            Parameter("on", bool, True, "whether at all"),
        ),
        function=function,
        workspace=lambda shape, n_experts: 0,
    )
    base = torch.ones(2)
    with pytest.raises(ValueError, match="scales: missing; one for each expert"):
        method(base, [base])
    assert method(base, [base, base], scales=2.0).tolist() == [4.0, 4.0]
    assert method(base, [base, base], scales=torch.tensor([1.0, 2.0])).tolist() == [3.0, 3.0]
    assert method(base, [base], scales=(5,), on="off").tolist() == [1.0, 1.0]
    assert method.resolve(2, {"scales": "1e1"}) == {"scales": [10.0, 10.0], "on": True}


# State dictionaries.


def models(n_experts: int = 2) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    def model(seed: int) -> dict[str, Tensor]:
        return {
            "z.weight": randn(12, 8, seed=seed),
            "a.norm": randn(8, seed=seed + 100, dtype=torch.bfloat16),
            "steps": torch.tensor(7),
            "mask": torch.tensor([True, False]),
        }

    return model(0), [model(t + 1) for t in range(n_experts)]


@pytest.mark.parametrize("name", names())
def test_state_dicts_are_merged_tensor_by_tensor(name: str) -> None:
    n_experts, parameters = call_of(name)
    if any(p.name == "weight" for p in get(name).parameters):
        parameters["weight"] = [0.5, 0.25][:n_experts]
    base, experts = models(n_experts)
    merged = merge_state_dicts(base, experts, name, **parameters)
    assert list(merged) == list(base)
    for key in ("z.weight", "a.norm"):
        expected = merge(base[key], [e[key] for e in experts], name, **parameters)
        assert same_bits(merged[key], expected)
    assert torch.equal(merged["steps"], base["steps"]) and merged["steps"].data_ptr() != base["steps"].data_ptr()
    assert torch.equal(merged["mask"], base["mask"])


def test_state_dicts_without_base_follow_the_first_expert() -> None:
    _, experts = models()
    experts[1] = OrderedDict(reversed(experts[1].items()))
    merged = merge_state_dicts(None, experts, "linear", out_dtype=torch.float16)
    assert list(merged) == list(experts[0])
    assert merged["z.weight"].dtype == torch.float16 and merged["steps"].dtype == torch.int64
    expected = merge(None, [e["a.norm"] for e in experts], "linear", out_dtype=torch.float16)
    assert same_bits(merged["a.norm"], expected)


def test_errors_of_state_dicts_name_the_tensor() -> None:
    base, experts = models()
    with pytest.raises(ValueError, match="experts: got none"):
        merge_state_dicts(base, [])
    with pytest.raises(ValueError, match=r"experts\[1\]: has no tensor 'a.norm' \(1 missing\), which base has"):
        merge_state_dicts(base, [experts[0], {k: v for k, v in experts[1].items() if k != "a.norm"}])
    with pytest.raises(ValueError, match=r"experts\[0\]: has a tensor 'extra' \(1 extra\), which base has not"):
        merge_state_dicts(base, [experts[0] | {"extra": torch.zeros(1)}, experts[1]])
    with pytest.raises(ValueError, match=r"steps: experts\[1\] differs from base"):
        merge_state_dicts(base, [experts[0], experts[1] | {"steps": torch.tensor(8)}])
    with pytest.raises(ValueError, match=r"steps: experts\[0\] differs from base"):
        merge_state_dicts(base, [experts[0] | {"steps": torch.tensor(7, dtype=torch.int32)}, experts[1]])
    with pytest.raises(ValueError, match=r"z.weight: experts\[0\]: got shape \[8, 12\], need \[12, 8\]"):
        merge_state_dicts(base, [experts[0] | {"z.weight": torch.zeros(8, 12)}, experts[1]])
    with pytest.raises(TypeError, match=r"z.weight: experts\[0\]: got dtype int64"):
        merge_state_dicts(base, [experts[0] | {"z.weight": torch.zeros(12, 8).long()}, experts[1]])
    experts[1]["a.norm"][3] = math.nan
    with pytest.raises(NonFiniteError, match=r"a.norm: experts\[1\]: got 1 NaN") as caught:
        merge_state_dicts(base, experts)
    assert (caught.value.argument, caught.value.index, caught.value.count) == ("a.norm: experts[1]", 1, 1)
    with pytest.raises(ValueError, match="unknown merge method"):
        merge_state_dicts(base, experts, "nothing")


def test_module_has_the_names_in_all_and_no_others() -> None:
    for name in resm_kernels.__all__:
        assert getattr(resm_kernels, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'merge_everything'"):
        resm_kernels.merge_everything  # noqa: B018
