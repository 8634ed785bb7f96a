"""The grid of a report: rows and columns of models of every kind, from their tensors' names alone."""

from __future__ import annotations

import pytest

from resm_kernels.report.grid import make_grid


def names(*patterns: str) -> list[str]:
    """Each pattern with 0 and 1 in place of `*`."""
    return [n for p in patterns for n in ([p.replace("*", str(i)) for i in (0, 1)] if "*" in p else [p])]


@pytest.mark.parametrize(
    ("tensors", "rows"),
    [
        (names("shared.weight", "encoder.block.*.layer.0.SelfAttention.q.weight", "decoder.block.*.layer.1.wi.weight"),
         ["embeddings", "encoder 0", "encoder 1", "decoder 0", "decoder 1"]),
        (names("model.decoder.layers.*.fc1.weight", "model.encoder.layers.*.fc1.weight", "proj_out.weight"),
         ["encoder 0", "encoder 1", "decoder 0", "decoder 1", "final"]),
        (names("lm_head.weight", "model.layers.*.mlp.up_proj.weight", "visual.blocks.*.attn.qkv.weight"),
         ["vision_tower 0", "vision_tower 1", "text_decoder 0", "text_decoder 1", "final"]),
        (names("backbone.embeddings.weight", "backbone.layers.*.mixer.A_log", "backbone.norm_f.weight"),
         ["embeddings", "0", "1", "final"]),
        (names("0.auto_model.encoder.layer.*.attention.self.query.weight"), ["0", "1"]),
        (names("unet/down_blocks.*.conv.weight", "vae/decoder.up_blocks.*.conv.weight"),
         ["unet/down_blocks 0", "unet/down_blocks 1", "vae/decoder.up_blocks 0", "vae/decoder.up_blocks 1"]),
        (names("*.w.weight", "model.*.w.weight"), ["0", "1", "model 0", "model 1"]),
        (names("word_embeddings.weight", "pooler.dense.weight"), ["embeddings", "final"]),
        (["layers." + "9" * 5000 + ".w.weight", "layers.0.w.weight"], ["0", "final"]),
        ([], []),
    ],
)  # fmt: skip
def test_rows(tensors: list[str], rows: list[str]) -> None:
    grid = make_grid(tensors)
    assert grid.rows == rows
    assert {*grid.places} == {*tensors}
    assert all(row in grid.rows and column in grid.columns for row, column in grid.places.values())


def test_no_two_layers_share_a_row() -> None:
    tensors = names("encoder.layers.*.a.weight", "decoder.layers.*.a.weight", "visual.*.a.weight", "*.a.weight")
    places = make_grid([*tensors, "x.0.a.weight"]).places.values()
    assert len({*places}) == len(places) == 9
