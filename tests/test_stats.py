"""Spectra and interference of a recipe's models: against numpy's SVD, through engine, table, JSON and command."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import Family, llama_config, save_model
from conftest import RunCommand
from inputs import experts_with_spectra

from resm_kernels.engine import checkpoint_stats
from resm_kernels.engine.stats import Spectra, tensor_spectra

pytestmark = pytest.mark.usefixtures("one_thread")

# Gram matrices get σ_i to 1e-16·σ_1²/σ_i, and these spectra fall to about 1e-3.
SPECTRUM = 1e-9


def interferences(us: list[np.ndarray], values: list[np.ndarray], vs: list[np.ndarray]) -> tuple[float, float]:
    """Interference and STI as `linalg.spectrum` defines them, in numpy."""
    n_experts, overlap = len(us), 0.0
    for s, t in itertools.permutations(range(n_experts), 2):
        overlap += float(np.linalg.norm(us[s].T @ (us[t] * values[t]) @ vs[t].T @ vs[s])) ** 2
    u, v, sigma = np.hstack(us), np.hstack(vs), np.concatenate(values)
    unit = np.eye(len(sigma))
    sti = np.abs((u.T @ u - unit) @ np.diag(sigma) @ (v.T @ v - unit)).sum()
    return float(overlap / ((n_experts - 1) * (sigma**2).sum())), float(sti)


def test_spectra_equal_numpys(family: Family) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rows = {row.name: row for row in checkpoint_stats(family.recipe("resm"), spectra=True)}
    row = rows[name]
    spectra = row.spectra
    assert spectra is not None
    m, n = row.shape
    deltas = [(e[name].double() - family.base[name].double()).numpy() for e in family.experts]
    svds = [np.linalg.svd(d, full_matrices=False) for d in deltas]
    assert spectra.indices == list(range(1, 33))
    assert spectra.kept == row.ranks
    for t, (_, s, _) in enumerate(svds):
        share = s / s.sum()
        assert spectra.values[t] == pytest.approx(s / s[0], abs=SPECTRUM)
        assert spectra.largest[t] == pytest.approx(s[0], rel=SPECTRUM)
        assert spectra.frobenius[t] == pytest.approx(np.linalg.norm(deltas[t]), rel=SPECTRUM)
        assert spectra.nuclear[t] == pytest.approx(np.linalg.norm(deltas[t], "nuc"), rel=SPECTRUM)
        assert spectra.effective_rank[t] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=SPECTRUM)
        assert spectra.stable_rank[t] == pytest.approx((s**2).sum() / s[0] ** 2, rel=SPECTRUM)
        for rank, energy in ((spectra.rank_90[t], 0.9), (spectra.rank_99[t], 0.99)):
            assert (s[:rank] ** 2).sum() >= energy * (s**2).sum() > (s[: rank - 1] ** 2).sum()
        i = np.arange(2, 17)  # 32/20 and 32/2
        slope = np.polyfit(np.log(i), np.log(s[1:16]), 1, w=i**-0.5)[0]
        assert spectra.decay[t] == pytest.approx(-slope, rel=1e-8)
    us = [u[:, :k] for (u, _, _), k in zip(svds, row.ranks, strict=True)]
    vs = [v[:k].T for (_, _, v), k in zip(svds, row.ranks, strict=True)]
    values = [s[:k] for (_, s, _), k in zip(svds, row.ranks, strict=True)]
    for a, b in itertools.permutations(range(3), 2):
        smaller, larger = sorted((row.ranks[a], row.ranks[b]))
        for bases, overlaps, expected, size in (
            (us, spectra.left_overlap, spectra.left_expected, m),
            (vs, spectra.right_overlap, spectra.right_expected, n),
        ):
            cosine = np.linalg.norm(bases[a].T @ bases[b]) ** 2 / smaller
            assert overlaps[a][b] == pytest.approx(cosine, rel=1e-8)
            assert expected[a][b] == larger / size
    interference, sti = interferences(us, values, vs)
    assert spectra.interference == pytest.approx(interference, rel=1e-8)
    assert spectra.sti == pytest.approx(sti, rel=1e-8)
    assert 0 < spectra.interference_expected < 1


def test_spectra_are_opt_in_and_only_of_what_is_decomposed(family: Family) -> None:
    plain = checkpoint_stats(family.recipe("resm"))
    assert all(row.spectra is None for row in plain)
    family.change(0, lm_head__weight=torch.full((64, 32), torch.nan))
    recipe = family.recipe("resm", parameters={"spectral": [{"filter": "embed", "value": False}, {"value": True}]})
    rows = {row.name: row for row in checkpoint_stats(recipe, spectra=True)}
    assert all((row.spectra is not None) == row.spectral for row in rows.values())
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert rows[name].spectra is None
    assert rows["lm_head.weight"].problem is not None
    exact = checkpoint_stats(family.recipe("resm", parameters={"decomposition": "exact"}), spectra=True)
    for row in exact:
        if row.spectra is not None and row.name in rows and rows[row.name].spectra is not None:
            assert row.spectra.largest == pytest.approx(rows[row.name].spectra.largest, rel=SPECTRUM)


def test_copies_interfere_wholly_and_an_untouched_tensor_not_at_all(family: Family) -> None:
    base, experts = experts_with_spectra(40, 30, 1)
    copies = tensor_spectra(base, experts * 3, [10, 10, 10])
    assert copies.interference == pytest.approx(1)
    assert [copies.left_overlap[0][2], copies.right_overlap[2][0]] == pytest.approx([1, 1])
    untouched = tensor_spectra(base, [base, base], [10, 10])
    assert untouched.values == [[0.0] * 30] * 2
    assert (untouched.kept, untouched.effective_rank, untouched.rank_99) == ([0, 0], [0.0, 0.0], [0, 0])
    assert (untouched.interference, untouched.interference_expected, untouched.sti) == (0.0, 0.0, 0.0)
    assert all(math.isnan(d) for d in untouched.decay)


def test_spectrum_in_the_json_is_bounded() -> None:
    base, experts = experts_with_spectra(200, 150, 2)
    spectra = tensor_spectra(base, experts, [75, 75])
    assert len(spectra.indices) <= 64
    assert (spectra.indices[0], spectra.indices[-1]) == (1, 150)
    assert spectra.indices == sorted(set(spectra.indices))
    expected = torch.linalg.svdvals(experts[1].double() - base.double())
    shares = (expected / expected[0])[torch.tensor(spectra.indices) - 1].tolist()
    assert spectra.values[1] == pytest.approx(shares, abs=1e-8)


def test_bits_do_not_depend_on_threads(use_threads: Callable[[int], None]) -> None:
    base, experts = experts_with_spectra(330, 310, 3)
    results: list[Spectra] = []
    for threads in (1, 2, 3):
        use_threads(threads)
        results.append(tensor_spectra(base, experts, [100, 90, 103]))
    assert results[0] == results[1] == results[2]


def test_command_shows_spectra(family: Family, run: RunCommand) -> None:
    recipe = family.recipe_file("resm", parameters={"spectral": True})
    code, out, _ = run("stats", recipe, "--spectra")
    assert code == 0
    for part in ("effective rank", "decay", "interference (random)", "model.layers.0.self_attn.q_proj.weight"):
        assert part in out
    assert len({len(line) for line in out.splitlines()[1:]}) == 1  # nothing folds
    code, out, _ = run("stats", recipe)
    assert code == 0 and "interference" not in out
    code, out, _ = run("stats", recipe, "--spectra", "--json", "-", "--quiet")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)["tensors"]}
    assert rows["model.norm.weight"]["spectra"] is None
    assert set(rows["lm_head.weight"]["spectra"]) == set(Spectra.__dataclass_fields__)


def test_command_draws_a_picture(
    family: Family, run: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra `plot`")
    file = tmp_path / "picture.png"
    assert run("stats", family.recipe_file("resm"), "--plot", file, "--json", tmp_path / "s.json")[0] == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    drawn = {row["name"]: row["spectra"] for row in json.loads((tmp_path / "s.json").read_text())["tensors"]}
    assert drawn["model.layers.0.self_attn.q_proj.weight"] is not None
    assert drawn["model.embed_tokens.weight"] is None  # averaged
    # What cannot be drawn is said before the models are read.
    monkeypatch.setattr("resm_kernels.engine.stats.plan_merge", None)
    code, _, err = run("stats", family.recipe_file("resm"), "--plot", tmp_path / "picture.gif")
    assert code == 1 and err.startswith("error: plot: got ")


def test_the_command_says_what_is_left_out_and_what_configurations_say(family: Family, run: RunCommand) -> None:
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4)}
    save_model(family.folders[0], family.experts[0] | frequencies, llama_config(rope_theta=5e5))
    recipe = family.recipe_file()
    code, _, err = run("stats", recipe)
    assert code == 0 and f"note: {family.folders[0]}: leaves out 1 vector of rotary frequencies" in err
    assert f"warning: {family.folders[0]}: config.json gives weights another meaning" in err
    code, _, err = run("stats", recipe, "--quiet")
    assert code == 0 and "note: " not in err and "warning: " in err
    code, _, err = run("stats", recipe, "--strict")
    assert code == 1 and err.startswith("error: strict: ")
