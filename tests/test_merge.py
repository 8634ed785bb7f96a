"""The front door: merge, merge_state_dicts, the registry of methods, and how parameters are checked."""

from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import torch
from inputs import call_of, group, randn, same_bits
from torch import Tensor

import resm_kernels
from resm_kernels import NonFiniteError, merge, merge_state_dicts, methods
from resm_kernels.methods import REQUIRED, Method, Parameter, get, names

AVERAGES = {"linear", "karcher", "passthrough", "nuslerp", "multislerp"}
"""Methods that need no base; the last two merge differences if there is one."""


def test_registry_finds_methods_by_name_and_suggests_the_nearest() -> None:
    assert {"linear", "resm", "task_arithmetic", "ties", "tsvm"} < set(names()) and list(names()) == sorted(names())
    for name in names():
        method = get(name)
        assert isinstance(method, Method) and method.name == name
        assert method.title and method.reference.startswith("https://")
        assert method.needs_base == (name not in AVERAGES)
    with pytest.raises(
        ValueError, match=rf"unknown merge method 'tie', did you mean 'ties'\?; known: {', '.join(names())}"
    ):
        get("tie")
    with pytest.raises(ValueError, match=r"unknown merge method 'xyz'; known"):
        merge(torch.zeros(2), [torch.zeros(2)], "xyz")


@pytest.mark.parametrize("name", ["linear", "resm", "task_arithmetic", "ties", "tsvm"])
@pytest.mark.parametrize("shape", [(12, 10), (7,), (), (0,), (0, 4)], ids=str)
@pytest.mark.parametrize("out_dtype", [None, torch.float16], ids=str)
def test_every_method_merges_every_shape(name: str, shape: tuple[int, ...], out_dtype: torch.dtype | None) -> None:
    base, experts = group(shape, 3, base_dtype=torch.bfloat16, expert_dtypes=[torch.float32])
    found = merge(base, experts, name, out_dtype=out_dtype)
    assert found.shape == shape and found.dtype == (out_dtype or torch.bfloat16)
    assert found.is_contiguous() and bool(torch.isfinite(found).all())
    assert all(found.data_ptr() != t.data_ptr() for t in [base, *experts] if t.numel())
    # Experts may come as any sequence; the method itself can be called alike.
    assert same_bits(found, merge(base, tuple(experts), name, out_dtype=out_dtype))
    assert same_bits(found, methods.get(name)(base, experts, out_dtype=out_dtype))


@pytest.mark.parametrize("name", names())
def test_workspace_is_a_bound_that_grows_with_the_tensor(name: str) -> None:
    small, large = (get(name).workspace((n, n), 3) for n in (64, 4096))
    assert 0 < small < large


@pytest.mark.parametrize("name", names())
def test_tensors_that_do_not_fit_are_refused_by_name(name: str) -> None:
    n_experts, given = call_of(name)
    base, experts = group((6, 5), n_experts)
    last = n_experts - 1
    other = experts[last].mT
    with pytest.raises(ValueError, match=rf"experts\[{last}\]: got shape \[5, 6\], need \[6, 5\]"):
        merge(base, [*experts[:last], other], name, **given)
    with pytest.raises(TypeError, match=r"experts\[0\]: got dtype int64"):
        merge(base, [experts[0].long(), *experts[1:]], name, **given)
    with pytest.raises(ValueError, match="experts: got none"):
        merge(base, [], name, **given)
    with pytest.raises(ValueError, match="experts: got a tensor"):
        merge(base, experts[0], name, **given)
    with pytest.raises(ValueError, match=r"experts\[0\]: requires grad"):
        merge(base, [experts[0].clone().requires_grad_(), *experts[1:]], name, **given)
    experts[0][2, 2] = math.inf
    with pytest.raises(NonFiniteError, match=r"experts\[0\]: got 1 NaN or infinite"):
        merge(base, experts, name, **given)


@pytest.mark.parametrize("name", [n for n in names() if get(n).min_experts > 1 or get(n).max_experts])
def test_number_of_experts_is_checked(name: str) -> None:
    method, (n_experts, given) = get(name), call_of(name)
    base, experts = group((6, 5), n_experts + 1)
    wrong = experts if method.max_experts == n_experts else experts[: method.min_experts - 1]
    with pytest.raises(ValueError, match=rf"experts: got {len(wrong)}, but {name} merges (at least )?{n_experts}"):
        merge(base, wrong, name, **given)


def test_base_of_another_shape_than_linears_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        merge(torch.zeros(4), [torch.zeros(3), torch.zeros(3)], "linear")


def test_unknown_parameters_name_the_nearest() -> None:
    base, experts = group((6, 5), 2)
    with pytest.raises(ValueError, match=r"ties has no parameter 'densty', did you mean 'density'\?; it has weight"):
        merge(base, experts, "ties", densty=0.2)
    with pytest.raises(TypeError, match="ties: pass 'lambda' as 'lambda_'"):
        merge(base, experts, "ties", **{"lambda": 0.5})
    with pytest.raises(ValueError, match=r"ties has no parameter 'lamda_', did you mean 'lambda'\?"):
        merge(base, experts, "ties", lamda_=0.5)
    with pytest.raises(ValueError, match="linear has no parameter 'lambda_'"):
        merge(base, experts, "linear", lambda_=0.5)


# Parameters.


def test_numbers_are_read_as_recipes_write_them() -> None:
    p = Parameter("x", float, 1.0, "a number", minimum=0.0, maximum=2.0)
    assert [p.validate(v) for v in (1, "1e-3", 0.5, "2")] == [1.0, 1e-3, 0.5, 2.0]
    for bad in (-0.1, 2.1, math.nan, math.inf, "many", None, True, [1], {}):
        with pytest.raises(ValueError, match=r"^x: got .*, need a number from 0 to 2$"):
            p.validate(bad)


def test_whole_numbers_booleans_and_choices() -> None:
    whole = Parameter("k", int, 1, "a count", minimum=1)
    assert whole.validate(3.0) == 3 and isinstance(whole.validate(3.0), int) and whole.validate("4") == 4
    for bad in (1.5, 0, "x", True):
        with pytest.raises(ValueError, match=r"^k: got .*, need a whole number of at least 1$"):
            whole.validate(bad)
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


def test_none_means_left_to_the_method_only_where_that_is_the_default() -> None:
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
    n_experts, given = call_of(name)
    if any(p.name == "weight" for p in get(name).parameters):
        given["weight"] = [0.5, 0.25][:n_experts]
    base, experts = models(n_experts)
    found = merge_state_dicts(base, experts, name, **given)
    assert list(found) == list(base)
    for key in ("z.weight", "a.norm"):
        wanted = merge(base[key], [e[key] for e in experts], name, **given)
        assert same_bits(found[key], wanted)
    assert torch.equal(found["steps"], base["steps"]) and found["steps"].data_ptr() != base["steps"].data_ptr()
    assert torch.equal(found["mask"], base["mask"])


def test_state_dicts_without_base_follow_the_first_expert() -> None:
    _, experts = models()
    experts[1] = OrderedDict(reversed(experts[1].items()))
    found = merge_state_dicts(None, experts, "linear", out_dtype=torch.float16)
    assert list(found) == list(experts[0])
    assert found["z.weight"].dtype == torch.float16 and found["steps"].dtype == torch.int64
    wanted = merge(None, [e["a.norm"] for e in experts], "linear", out_dtype=torch.float16)
    assert same_bits(found["a.norm"], wanted)


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


def test_module_has_what_it_says_and_nothing_else() -> None:
    for name in resm_kernels.__all__:
        assert getattr(resm_kernels, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'merge_everything'"):
        resm_kernels.merge_everything  # noqa: B018
