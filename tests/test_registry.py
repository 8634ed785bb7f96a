"""How methods are declared and registered: signatures, plug-ins of installed packages, and errors."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from torch import Tensor

from resm_kernels import merge, methods
from resm_kernels.methods import REQUIRED, Lambda, Method, Option, Parameter, Weight, each, get, merge_method, names

Percent = Annotated[float, Option("a share", minimum=0, maximum=100)]


@pytest.fixture(autouse=True)
def separate_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the methods that a test registers or loads."""
    methods_by_name = {name: get(name) for name in names()}
    monkeypatch.setattr("resm_kernels.methods._registry._methods", methods_by_name)
    monkeypatch.setattr("resm_kernels.methods._registry._loaded", set())


def decorated(**arguments: Any) -> Any:
    return merge_method(title="Test", reference="https://example.org", **arguments)


def test_parameters_are_read_from_the_signature() -> None:
    @decorated(min_experts=2, max_experts=4)
    def everything(
        base: Tensor,
        experts: list[Tensor],
        *,
        weight: Weight = each(1.0),
        rank: Annotated[int | None, Option("a rank", minimum=1)] = None,
        share: Annotated[Percent, Option("another doc")] = 5.0,
        where: Annotated[Literal["layer", "row"], Option("a choice", vocabulary="row")] = "layer",
        scales: Annotated[list[float | None], Option("scales")] = each(None),
        lambda_: Lambda,
        mask: Annotated[bool, Option("no effect", ignored=True)] = False,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        return torch.tensor([*weight, lambda_, *(s or 0.0 for s in scales)])

    method = get("everything")
    assert method.parameters == (
        Parameter("weight", float, 1.0, get("ties").parameter("weight").doc, per_expert=True),
        Parameter("rank", int, None, "a rank", minimum=1),
        Parameter("share", float, 5.0, "another doc"),
        Parameter("where", ("layer", "row"), "layer", "a choice", vocabulary="row"),
        Parameter("scales", float, None, "scales", per_expert=True),
        Parameter("lambda", float, REQUIRED, get("ties").parameter("lambda").doc),
        Parameter("mask", bool, False, "no effect", ignored=True),
    )
    assert method.needs_base and not method.draws
    assert (method.min_experts, method.max_experts) == (2, 4)
    assert method.resolve(2, {"lambda_": 2}, "lm_head.weight")["where"] == "row"
    one = torch.zeros(1)
    # Per-expert values arrive as lists, and the decorator returns the function itself.
    assert merge(one, [one, one], "everything", lambda_=3, scales=[7, None]).tolist() == [1, 1, 3, 7, 0]
    assert everything(one, [one], weight=[2.0], lambda_=4.0).tolist() == [2, 4, 0]


def test_base_and_seed_are_read_from_the_signature() -> None:
    def draws(base: Tensor | None, experts: list[Tensor], *, seed: int, out_dtype: torch.dtype | None) -> Tensor:
        return torch.tensor(seed)

    decorated()(draws)
    decorated(name="averaging", ignores_base=True)(draws)
    drawing, averaging = get("draws"), get("averaging")
    assert (drawing.needs_base, drawing.optional_base, drawing.draws) == (False, True, True)
    assert (averaging.needs_base, averaging.optional_base) == (False, False)
    assert int(merge(None, [torch.zeros(1)], "draws", name="a", seed=3)) == methods.tensor_key(3, "a")


def test_presets_make_a_function_several_methods() -> None:
    def rules(
        base: Tensor, experts: list[Tensor], *, rule: str, share: Percent = 1.0, out_dtype: torch.dtype | None
    ) -> Tensor:
        return torch.tensor([float(len(rule)), share])

    decorated(name="half", rule="long", share=50.0)(rules)
    assert get("half").parameters == (Parameter("share", float, 50.0, "a share", minimum=0, maximum=100),)
    assert merge(torch.zeros(1), [torch.zeros(1)], "half").tolist() == [4, 50]
    assert merge(torch.zeros(1), [torch.zeros(1)], "half", share=2).tolist() == [4, 2]
    with pytest.raises(TypeError, match="merge_method: min_expert: neither a keyword here nor an argument"):
        decorated(min_expert=2)(rules)
    with pytest.raises(TypeError, match="name: missing"):
        decorated()(functools.partial(rules, rule="short"))
    with pytest.raises(TypeError, match="rules: rule: annotate it"):
        decorated()(rules)


def no_experts(base: Tensor, *, out_dtype: torch.dtype | None) -> Tensor: ...
def no_dtype(base: Tensor, experts: list[Tensor]) -> Tensor: ...
def by_position(base: Tensor, experts: list[Tensor], share: Percent, *, out_dtype: torch.dtype | None) -> Tensor: ...
def bare(base: Tensor, experts: list[Tensor], *, a: float = 1.0, out_dtype: torch.dtype | None) -> Tensor: ...
def text(
    base: Tensor, experts: list[Tensor], *, a: Annotated[str, Option("")] = "", out_dtype: torch.dtype | None
) -> Tensor: ...
def single(base: Tensor, experts: list[Tensor], *, weight: Weight = 1.0, out_dtype: torch.dtype | None) -> Tensor: ...  # type: ignore[assignment]
def not_optional(
    base: Tensor,
    experts: list[Tensor],
    *,
    share: Percent = None,  # type: ignore[assignment]
    out_dtype: torch.dtype | None,
) -> Tensor: ...
def beyond(base: Tensor, experts: list[Tensor], *, share: Percent = 101.0, out_dtype: torch.dtype | None) -> Tensor: ...
def underscore(base: Tensor, experts: list[Tensor], *, a_: Percent = 1.0, out_dtype: torch.dtype | None) -> Tensor: ...


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_experts, "no_experts: a merge method's first two arguments are base and experts"),
        (no_dtype, "no_dtype: need a keyword argument out_dtype"),
        (by_position, "by_position: share: need a keyword-only argument"),
        (bare, r"bare: a: annotate it, such as Annotated\[float, Option"),
        (text, "text: a: got <class 'str'>, need float, int, bool, a Literal"),
        (single, r"single: weight: got the default 1.0, need each\(value\)"),
        (not_optional, "not_optional: share: need the default None for a type that allows None, and only there"),
        (beyond, "share: got 101.0, need a number from 0 to 100"),
        (underscore, "underscore: a_: a trailing underscore is for Python's reserved words alone"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_signatures_that_say_too_little_are_refused(function: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        decorated()(function)


def takes_fishers(
    base: Tensor | None, experts: list[Tensor], *, statistics: list[Tensor | None], out_dtype: torch.dtype | None
) -> Tensor:
    return torch.tensor([0.0 if s is None else 1.0 for s in statistics])


def takes_grams(
    base: Tensor | None,
    experts: list[Tensor],
    *,
    statistics: list[Tensor | None],
    transposed: bool,
    out_dtype: torch.dtype | None,
) -> Tensor:
    return torch.tensor([float(transposed), float(len(statistics))])


def test_statistics_are_arguments_of_methods_that_declare_them() -> None:
    decorated(statistics="fisher")(takes_fishers)
    decorated(statistics="gram", statistics_model="merged")(takes_grams)
    assert (get("takes_fishers").statistics, get("takes_fishers").statistics_model) == ("fisher", "expert")
    assert (get("takes_grams").statistics, get("takes_grams").statistics_model) == ("gram", "merged")
    one = torch.zeros(1)
    given = {"statistics": [None, one], "transposed": True}
    assert merge(None, [one, one], "takes_fishers", **given).tolist() == [0, 1]
    assert merge(None, [one, one], "takes_grams", **given).tolist() == [1, 2]
    assert get("takes_grams").parameters == ()


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        (takes_fishers, None, "statistics=None.* without the argument statistics and without the argument transposed"),
        (takes_fishers, "gram", "statistics='gram'.* with the argument statistics and with the argument transposed"),
        (takes_grams, "fisher", "statistics='fisher'.* with the argument statistics and without the argument trans"),
    ],
)
def test_statistics_that_are_declared_and_taken_must_agree(function: Any, kind: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        decorated(statistics=kind)(function)


def test_names_are_taken_once() -> None:
    def ties(base: Tensor, experts: list[Tensor], *, out_dtype: torch.dtype | None) -> Tensor: ...

    with pytest.raises(ValueError, match=r"merge method 'ties': got two, one from resm_kernels.methods.ties.ties and"):
        decorated()(ties)
    decorated(name="again")(ties)
    decorated(name="again")(ties)  # as a notebook does


def test_methods_can_be_registered_without_the_decorator() -> None:
    method = Method(
        name="first",
        title="First",
        reference="https://example.org",
        needs_base=False,
        parameters=(),
        function=lambda base, experts, *, out_dtype: experts[0].clone(),
        workspace=lambda shape, n_experts: 0,
    )
    methods.register(method)
    assert get("first") is method and "first" in names()
    assert merge(None, [torch.ones(2)], "first").tolist() == [1, 1]


def plug_in(folder: Path, name: str, code: str, package: str = "plug-in") -> None:
    """Put a module and its entry point where Python finds them, as pip would."""
    module = f"module_of_{package.replace('-', '_')}"
    (folder / f"{module}.py").write_text(code)
    metadata = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[resm_kernels.methods]\n{name} = {module}\n")


METHOD = """
import torch
from torch import Tensor
from resm_kernels.methods import merge_method

@merge_method(title="Plugged in", reference="https://example.org", name={name!r})
def plugged_in(base: Tensor, experts: list[Tensor], *, out_dtype: torch.dtype | None) -> Tensor:
    return experts[0].clone()
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("module_of_")]:
        del sys.modules[name]


def test_installed_packages_are_found_by_name_and_listed(site: Path) -> None:
    plug_in(site, "plugged_in", METHOD.format(name="plugged_in"))
    get("tsvm")
    assert "module_of_plug_in" not in sys.modules, "nothing is imported before it is needed"
    assert get("plugged_in").title == "Plugged in"
    assert "plugged_in" in names() and names() == names()
    with pytest.raises(ValueError, match="unknown merge method 'plugged_on', did you mean 'plugged_in'"):
        get("plugged_on")


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("broken", "import a_module_that_is_missing", "could not be loaded: ModuleNotFoundError: No module named"),
        ("empty", "", "registers no merge method of that name"),
        ("other", METHOD.format(name="another"), "registers no merge method of that name"),
        ("ties", METHOD.format(name="ties"), "could not be loaded: ValueError: merge method 'ties': got two"),
    ],
)
def test_broken_packages_are_named(site: Path, name: str, code: str, message: str) -> None:
    plug_in(site, name, code)
    entry_point = r"\(entry point 'module_of_plug_in' in resm_kernels.methods\)"
    expected = rf"the plug-in '{name}' of plug-in 1.0 {entry_point} {message}"
    with pytest.raises(ValueError, match=expected):
        names()
    assert get("tsvm").name == "tsvm", "known methods need no plug-in"
    if name != "ties":
        with pytest.raises(ValueError, match=expected):
            get(name)


def test_two_packages_cannot_have_one_name(site: Path) -> None:
    plug_in(site, "shared", METHOD.format(name="shared"), "first")
    plug_in(site, "shared", METHOD.format(name="shared"), "second")
    message = r"the plug-in 'shared' of (first|second) 1.0 .* could not be loaded: .* got two"
    with pytest.raises(ValueError, match=message):
        get("shared")
