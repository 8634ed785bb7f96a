"""Layers whose model does more than call them are told from those that PEFT's wrapper can stand in for."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from resm_kernels.engine.wrapped_layers import attribute_read, is_linear

pytest.importorskip("transformers", reason="transformers is not installed (test extra)")


@pytest.mark.parametrize(
    ("model", "owner", "child", "read"),
    [
        ("whisper", "WhisperEncoder", "conv1", "stride"),
        ("mamba", "MambaMixer", "dt_proj", "weight"),
        ("mamba", "MambaMixer", "in_proj", None),
        # The weight is asked for its dtype, or cut for tensor-parallel training only.
        ("t5", "T5DenseActDense", "wo", None),
        ("bloom", "BloomMLP", "dense_4h_to_h", None),
    ],
)
def test_what_a_model_reads_of_a_layer(model: str, owner: str, child: str, read: str | None) -> None:
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    assert attribute_read(getattr(module, owner), child) == read


class Same(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_linear_layers_of_other_classes() -> None:
    assert is_linear(nn.Linear(3, 2)) and is_linear(Same(3, 2)) and is_linear(Same(3, 2, bias=False))
    assert not is_linear(Scaled(3, 2))
