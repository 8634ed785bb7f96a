"""Pictures of statistics: files that readers of their formats accept, for models of all kinds, and errors that help."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Family

from resm_kernels.engine import TensorStats, checkpoint_stats
from resm_kernels.engine.stats import tensor_spectra
from resm_kernels.plot import FORMATS, PlotError, _limit_kinds, _short, plot_stats
from resm_kernels.tensor_names import module_kind

pytestmark = pytest.mark.usefixtures("one_thread")

pytest.importorskip("matplotlib", reason="pictures need the extra `plot`")


def is_picture(file: Path) -> bool:
    data = file.read_bytes()
    if file.suffix == ".png":
        from matplotlib.image import imread

        pixels = imread(file)
        return data.startswith(b"\x89PNG\r\n\x1a\n") and min(pixels.shape[:2]) > 300 and pixels[..., :3].min() < 0.5
    if file.suffix == ".svg":
        from xml.etree import ElementTree

        return ElementTree.fromstring(data).tag.endswith("svg")
    return data.startswith(b"%PDF-") and data.rstrip().endswith(b"%%EOF")


def vector_row(name: str, sparsity: float) -> TensorStats:
    return TensorStats(name, (32,), False, [sparsity] * 2, [0.0] * 2, [1.0] * 2, [], {})


def matrix_row(name: str, shape: tuple[int, int] = (9, 7), delta: float = 1.0) -> TensorStats:
    base = torch.zeros(shape)
    generator = torch.Generator().manual_seed(len(name))
    experts = [delta * torch.randn(shape, generator=generator) for _ in range(2)]
    spectra = tensor_spectra(base, experts, [3, 3])
    return TensorStats(name, shape, True, [0.1, 0.2], [0.0] * 2, [1.0] * 2, [3, 3], {}, spectra=spectra)


@pytest.mark.parametrize("suffix", FORMATS)
def test_writes_a_picture(family: Family, tmp_path: Path, suffix: str) -> None:
    family.change(1, model__norm__weight=torch.full((32,), torch.nan))
    rows = checkpoint_stats(family.recipe("resm", parameters={"spectral": True}), spectra=True)
    file = tmp_path / f"picture{suffix}"
    plot_stats(rows, [str(f) for f in family.folders], file)
    assert is_picture(file)
    if suffix == ".svg":  # text is paths there, comments name it
        text = file.read_text()
        for part in ("q_proj", "down_proj", "lm_head", "expert0", "interference"):
            assert part in text


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "picture.svg"
    plot_stats([matrix_row(r"layers.0.$\frac$.weight"), matrix_row("_w.weight")], ["_a$^$", "b"], file)
    for part in (r"$\frac$ (9×7)", "_a$^$", "<!--  _w -->"):
        assert part in file.read_text()


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [vector_row("model.layers.0.norm.weight", 0.5), vector_row("model.layers.1.norm.weight", 0.7)],
        [matrix_row("w")],
        [matrix_row("w", (1, 1)), matrix_row("layers.0.v.weight", delta=0.0)],
        [matrix_row(f"model.layers.{i}.part{j}.weight") for i in range(8) for j in range(15)],
    ],
    ids=["nothing", "vectors", "one matrix", "no spectrum", "120 matrices"],
)
def test_any_model_can_be_drawn(tmp_path: Path, rows: list[TensorStats]) -> None:
    file = tmp_path / "picture.png"
    plot_stats(rows, ["a", "b"], file)
    assert is_picture(file)


@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("model.layers.13.self_attn.q_proj.weight", ("q_proj", 13)),
        ("model.layers.3.self_attn.q_proj.bias", ("q_proj.bias", 3)),
        ("model.layers.2.mlp.experts.7.w1.weight", ("w1", 2)),
        ("transformer.h.4.attn.c_attn.weight", ("c_attn", 4)),
        ("model.embed_tokens.weight", ("embed_tokens", None)),
        ("head.0.weight", ("head.0", 0)),
        ("w", ("w", None)),
        ("weight", ("weight", None)),
    ],
)
def test_positions(name: str, position: tuple[str, int | None]) -> None:
    assert module_kind(name) == position


def test_kinds_are_limited_to_the_commonest() -> None:
    positions = {
        f"layers.{i}.part{j}.weight": module_kind(f"layers.{i}.part{j}.weight") for j in range(15) for i in range(j + 1)
    }
    _limit_kinds(positions, positions)
    kinds = {p.kind for p in positions.values()}
    assert kinds == {"other", *(f"part{j}" for j in range(4, 15))}


def test_experts_are_told_apart() -> None:
    assert _short(["a/x", "b/y/"]) == ["x", "y"]
    assert _short(["a/x", "b/x"]) == ["a/x", "b/x"]


def test_without_matplotlib_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(name: str, *arguments: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'")
        return real(name, *arguments)

    monkeypatch.setattr("resm_kernels.plot.importlib.import_module", missing)
    with pytest.raises(PlotError, match=r"No module named 'matplotlib'.*pip install 'resm-kernels\[plot\]'"):
        plot_stats([], [], tmp_path / "picture.png")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("picture.jpeg", r"plot: got '.*picture.jpeg', need a name that ends in .png, .svg, .pdf"),
        ("picture", "need a name that ends in"),
        ("no/picture.png", "need an existing folder; .*no is none"),
    ],
)
def test_errors(tmp_path: Path, file: str, message: str) -> None:
    with pytest.raises(PlotError, match=message):
        plot_stats([], [], tmp_path / file)
    assert list(tmp_path.iterdir()) == []
