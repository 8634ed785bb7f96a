"""merge_lora, compared with a merge of the whole weights in float64 by the library's own methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_weights, save_adapter, save_model
from inputs import relative
from safetensors.torch import load_file, save_file
from torch import Tensor

import resm_kernels.lora.elements as elements_module
import resm_kernels.lora.factors as factors_module
from resm_kernels.engine import merge_lora
from resm_kernels.lora import Factors
from resm_kernels.lora.elements import merge_elements_of
from resm_kernels.lora.low_rank import RankLimit, merge_factored, truncated
from resm_kernels.lora.routes import Route, route_of
from resm_kernels.methods import get, names

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {
    "model.layers.0.self_attn.q_proj": (32, 32),
    "model.layers.0.mlp.up_proj": (48, 32),
    "model.layers.2.mlp.down_proj": (32, 48),
}
METHODS: dict[str, list[dict[str, Any]]] = {
    "task_arithmetic": [{}, {"normalize": True, "lambda": 0.7}],
    "linear": [{}],
    "passthrough": [{}],
    "tsvm": [{"lambda": 0.8}, {"spectral": False}],
    "resm": [{"beta": 1.0}, {"rank_rule": "energy"}, {"granularity": "row"}, {"outlier_clip": True}, {}],
    "iso_c": [{}],
    "iso_cts": [{}, {"common_space_fraction": 0.0}],
    "star": [{}],
    "tsv_compress": [{}, {"rank": 2}, {"share": 0.1}],
    "dc_merge": [{"density": 0.3}, {"rank": 3, "smoothing": "average", "density": 0.3}],
    "resmerge": [{}, {"rank": 2}],
    "knots": [{"density": 0.5}, {"inner": "sum"}],
    "swudi": [{}, {"rank_ratio": 0.1}, {"rank_rule": "participation_sqrt"}],
    "multislerp": [{}],
    "nuslerp": [{}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}],
    "model_stock": [{}, {"filter_wise": True}],
    "svc": [
        *({}, {"inner": "tsvm"}, {"inner": "knots", "inner_density": 0.5}, {"inner": "ties", "inner_density": 0.4}),
        {"spectral": False, "inner": "iso_c"},
    ],
    "ties": [{"density": 0.3}],
    "dare_linear": [{"density": 0.4}],
    "dare_ties": [{"density": 0.4}],
    "della": [{"density": 0.4}],
    "della_linear": [{"density": 0.4}],
    "breadcrumbs": [{"density": 0.6}],
    "breadcrumbs_ties": [{"density": 0.6}],
    "sce": [{"select_topk": 0.5}],
    "nearswap": [{"t": 0.01}],
    "ram": [{"epsilon": 0.01}],
    "ramplus_tl": [{"epsilon": 0.01}],
    "wudi": [{"steps": 20}],
    "slerp": [{"t": 0.4}],
    "karcher": [{}],
    "arcee_fusion": [{}],
}
RANKS = {"q": (4, 6, 0), "up": (4, 2, 3), "down": (4, 6, 3)}
"""Of the three adapters, in each module."""
COUNTS = {"passthrough": 1, "slerp": 1, "nearswap": 1, "arcee_fusion": 1, "nuslerp": 2}
CASES = [(method, values) for method, choices in METHODS.items() for values in choices]


def factors(shape: tuple[int, int], rank: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out, inner = shape
    return torch.randn(rank, inner, generator=generator) * 0.1, torch.randn(out, rank, generator=generator) * 0.1


def write_adapter(folder: Path, seed: int, base: Path | str, rank: int = 4, **choices: Any) -> Path:
    """An adapter of the modules that `only` names, or of all."""
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "base_model_name_or_path": str(base)}
    config |= {"target_modules": ["q_proj", "up_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    only, saved, magnitudes = (choices.pop(key, default) for key, default in (("only", ""), ("saved", {}), ("m", {})))
    tensors = dict(saved)
    for i, (name, shape) in enumerate(SHAPES.items()):
        if only in name:
            r = choices.get("rank_pattern", {}).get(name.rpartition(".")[2], rank)
            a, b = factors(shape, r, 100 * seed + i)
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
            if name in magnitudes:
                tensors[f"{name}.lora_magnitude_vector"] = magnitudes[name]
    prefixed = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    return save_adapter(folder, prefixed, config | choices)


def products(folder: Path) -> dict[str, Tensor]:
    """s·B·A of each module in float64, by PEFT's rules."""
    config, stored = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    found = {}
    for name in SHAPES:
        key = f"base_model.model.{name}"
        if f"{key}.lora_A.weight" not in stored:
            continue
        a, b = stored[f"{key}.lora_A.weight"].double(), stored[f"{key}.lora_B.weight"].double()
        alphas = config.get("alpha_pattern") or {}
        alpha = next((v for p, v in alphas.items() if name.endswith(p.replace("\\.", "."))), config["lora_alpha"])
        scale = alpha / (len(a) ** 0.5 if config.get("use_rslora") else len(a))
        found[name] = scale * b @ a
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "base", random_weights(0, torch.float32))


@pytest.fixture(scope="module")
def adapters(base: Path) -> list[Path]:
    """Adapters of different ranks, scales and targets."""
    folder = base.parent
    return [
        write_adapter(folder / "a", 1, base),
        write_adapter(folder / "b", 2, base, rank=6, use_rslora=True, rank_pattern={"up_proj": 2}),
        write_adapter(folder / "c", 3, base, rank=3, only="mlp", alpha_pattern={"down_proj": 12}),
    ]


def recipe(method: str, adapters: list[Path], values: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """A recipe with weights that differ, one of them negative, where the method has weights."""
    models: list[dict[str, Any]] = [{"model": str(folder)} for folder in adapters]
    per_expert = {p.name for p in get(method).parameters if p.per_expert}
    if "weight" in per_expert and method != "nuslerp":
        for model, weight in zip(models, (1.0, 0.5, -0.7), strict=False):
            model["parameters"] = {"weight": weight}
    return {"merge_method": method, "models": models, "parameters": values, **keys}


def dense(method: str, base: Path, adapters: list[Path], values: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """What the method makes of the whole weights in float64, less the base's."""
    weights, deltas = load_file(base / "model.safetensors"), [products(folder) for folder in adapters]
    keywords = {("lambda_" if name == "lambda" else name): value for name, value in values.items()}
    if any(p.name == "weight" and p.per_expert for p in get(method).parameters) and method != "nuslerp":
        keywords["weight"] = [1.0, 0.5, -0.7][: len(adapters)]
    merged = {}
    for name, shape in SHAPES.items():
        original = weights[f"{name}.weight"].double()
        experts = [original + delta.get(name, torch.zeros(shape)) for delta in deltas]
        if any(name in delta for delta in deltas):
            call = {"out_dtype": torch.float64, "name": f"{name}.weight", "seed": seed}
            merged[name] = get(method)(original, experts, **call, **keywords) - original
    return merged


def best(m: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(m)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def test_every_method_has_a_case() -> None:
    tested = {name for name in names() if get(name).statistics is None}
    assert tested <= METHODS.keys() | {"median"}, tested - METHODS.keys()


@pytest.mark.parametrize("rank", [None, 5], ids=["whole", "rank 5"])
@pytest.mark.parametrize(("method", "values"), CASES, ids=str)
def test_equals_the_dense_route(
    tmp_path: Path, base: Path, adapters: list[Path], method: str, values: dict[str, Any], rank: int | None
) -> None:
    chosen = adapters[: COUNTS.get(method, 3)]
    needed = {"base_model": str(base)} if method in ("slerp", "karcher", "arcee_fusion") else {}
    report = merge_lora(recipe(method, chosen, values, **needed), tmp_path / "out", rank=rank, random_seed=3)
    expected, got = dense(method, base, chosen, values, seed=3), products(tmp_path / "out")
    assert got.keys() == expected.keys() and len(report.modules) == len(got)
    exact = report.modules[0].route not in ("elements", "weights")
    for module in report.modules:
        m, kept = expected[module.name], got[module.name]
        assert relative(torch.tensor(module.norm), m.norm()) < 1e-5
        # The certificate holds, and is the error itself, as far as fp32 factors show it.
        error = float((m - kept).norm() / m.norm())
        assert error <= module.error + 2e-6
        least = float((m - best(m, module.rank)).norm() / m.norm())
        assert module.error <= (least if exact else 1.02 * least) + 1e-5
        sizes = torch.cat([torch.linalg.svdvals(m), torch.zeros(1)])
        if exact and sizes[module.rank - 1] > 1.001 * sizes[module.rank]:  # else there are several best ones
            assert relative(kept, best(m, module.rank)) < 3e-6
        ranks = sum(RANKS[module.name.rpartition("_")[0].rpartition(".")[2]][: len(chosen)])
        assert module.rank <= min(rank or ranks, ranks) if exact else module.rank == (rank or ranks)
        if rank is None and exact:
            assert module.error < 1e-8


@pytest.mark.parametrize("method", ["tsvm", "resm", "iso_c", "iso_cts", "tsv_compress", "dc_merge", "star", "swudi"])
def test_ranks_that_do_not_fit_beside_each_other(tmp_path: Path, base: Path, method: str) -> None:
    """Each expert keeps ⌊r/T⌋ directions, which is less than its rank, and the ranks exceed the weight's."""
    adapters = [write_adapter(tmp_path / f"{i}", 10 + i, base, rank=rank) for i, rank in enumerate((14, 20, 3))]
    values = {"density": 0.3} if method == "dc_merge" else {}
    merge_lora(recipe(method, adapters, values), tmp_path / "out")
    expected, got = dense(method, base, adapters, values), products(tmp_path / "out")
    for name, m in expected.items():
        assert relative(got[name], m) < 3e-6


@pytest.mark.parametrize(("method", "values"), [c for c in CASES if COUNTS.get(c[0], 3) == 3], ids=str)
def test_copies_and_adapters_that_change_nothing(
    tmp_path: Path, base: Path, adapters: list[Path], method: str, values: dict[str, Any]
) -> None:
    """Factors that depend on each other, and those of an adapter that was not trained."""
    fresh = write_adapter(tmp_path / "fresh", 4, base, rank=2)
    tensors = load_file(fresh / "adapter_model.safetensors")
    save_file({n: t * ("lora_A" in n) for n, t in tensors.items()}, fresh / "adapter_model.safetensors")
    chosen = [adapters[0], adapters[0], fresh]
    needed = {"base_model": str(base)} if method in ("karcher",) else {}
    report = merge_lora(recipe(method, chosen, values, **needed), tmp_path / "out", random_seed=3)
    expected, got = dense(method, base, chosen, values, seed=3), products(tmp_path / "out")
    for module in report.modules:
        m = expected[module.name]
        assert float((m - got[module.name]).norm()) <= (module.error + 3e-6) * float(m.norm()) + 1e-9, module.name


def test_energy_where_the_result_has_full_rank(tmp_path: Path, base: Path, adapters: list[Path]) -> None:
    expected = dense("ties", base, adapters, {"density": 0.3})
    for energy, largest in ((0.7, None), (0.7, 4), (1.0, None)):
        out = tmp_path / f"{energy} {largest}"
        report = merge_lora(recipe("ties", adapters, {"density": 0.3}), out, energy=energy, max_rank=largest)
        for module in report.modules:
            squares = torch.linalg.svdvals(expected[module.name]).square()
            needed = int((squares.cumsum(0) < energy * squares.sum()).sum()) + 1
            assert abs(module.rank - min(needed, largest or needed)) <= 1
            error = relative(products(out)[module.name], expected[module.name])
            assert error <= module.error + 1e-6 and (largest or error <= (1 - energy) ** 0.5 + 1e-5)
    report = merge_lora(recipe("ties", adapters, {"density": 0.3}), tmp_path / "whole", rank=100)
    assert all(module.rank == min(module.shape) and module.error < 1e-5 for module in report.modules)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "breadcrumbs", "sce", "ram", "wudi"])
def test_bits_do_not_depend_on_the_size_of_blocks(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    shape = (700, 500)
    pairs = [factors(shape, rank, rank) for rank in (3, 5)]
    deltas = [Factors(b, a, 0.5) for a, b in pairs] + [torch.randn(shape, generator=torch.Generator().manual_seed(1))]
    values = METHODS[method][0]
    whole = merge_elements_of(shape, deltas, get(method), values, name="w", seed=4)
    for block_bytes in (1, 3 << 20):
        monkeypatch.setattr(elements_module, "_BLOCK_BYTES", block_bytes)
        assert torch.equal(merge_elements_of(shape, deltas, get(method), values, name="w", seed=4), whole)
    dense = [d if isinstance(d, Tensor) else d.scale * d.left @ d.right for d in deltas]
    expected = get(method)(torch.zeros(shape), dense, name="w", seed=4, **values)
    assert relative(whole, expected) < 1e-3  # a rounding decides what is kept at a threshold


def test_the_guide_lists_how_methods_merge() -> None:
    listed = (Path(__file__).parent.parent / "docs/merge_lora.md").read_text()
    for name in names():
        method = get(name)
        if method.statistics is None and name != "median":
            required = {"slerp": {"t": 0.5}, "nearswap": {"t": 0.1}}.get(name, {})
            route = route_of(method, method.resolve(COUNTS.get(name, 2), required))
            assert f"`{name}`" in listed, name
            row = next(line for line in listed.splitlines() if line.startswith(f"| `{name}`"))
            assert row.split("|")[2].strip() == ("exact" if route.is_exact else route.value), name


def resolved(method: str, values: dict[str, Any]) -> dict[str, Any]:
    keywords = {("lambda_" if key == "lambda" else key): value for key, value in values.items()}
    return get(method).resolve(COUNTS.get(method, 3), keywords)


# Outlier weights need the elements.
EXACT = [
    (method, values)
    for method, values in CASES
    if route_of(get(method), resolved(method, values)).is_exact and not values.get("beta")
]


@pytest.mark.parametrize(("method", "values"), EXACT, ids=str)
def test_exact_merges_form_no_matrix_of_the_weights_size(method: str, values: dict[str, Any]) -> None:
    """A weight of 120,000 × 150,000 elements would take 72 GB in fp32."""
    shape, chosen = (120_000, 150_000), resolved(method, values)
    pairs = [factors(shape, rank, 7 * rank) for rank in (2, 3, 1)[: COUNTS.get(method, 3)]]
    experts = [Factors(b, a, 0.5) for a, b in pairs]
    product = merge_factored(shape, experts, get(method), chosen, route_of(get(method), chosen))
    merged = truncated(product, RankLimit(4))
    assert merged.left.shape[0] == shape[0] and merged.right.shape[1] == shape[1] and 0 < merged.rank <= 4


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9])
def test_resm_forms_no_elements_where_they_cannot_matter(monkeypatch: pytest.MonkeyPatch, zeros: float) -> None:
    """The bound on the number of zeros holds, and the merge is the same as with the statistics."""
    pairs = []
    for seed in range(3):
        a, b = factors((400, 500), 3, seed)
        rows = torch.rand(400, generator=torch.Generator().manual_seed(seed)) < zeros
        b[rows] = 0
        bound = factors_module.least_nonzero(Factors(b, a, 1.0))
        assert 0.3 * (1 - zeros) * a.shape[1] * 400 / 3 < bound <= int((b @ a).count_nonzero())
        pairs.append(Factors(b, a, 1.0))
    values = get("resm").resolve(3, {})
    direct = merge_factored((400, 500), pairs, get("resm"), values, Route.CORES)
    monkeypatch.setattr(factors_module, "_needs_no_statistics", lambda *_: False)
    counted = merge_factored((400, 500), pairs, get("resm"), values, Route.CORES)
    assert relative(*(p.left @ p.core @ p.right.mT for p in (direct, counted) if p.core is not None)) < 1e-12
