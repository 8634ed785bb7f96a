"""Weights as quantised models store them, written anew from the formats' descriptions, and what they stand for."""

from __future__ import annotations

import json
import math

import torch
from torch import Tensor

NF4 = torch.tensor(
    [
        *(-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911),
        *(0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1.0),
    ]
)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Integers (n, m) as int32 words (⌈n·bits/32⌉, m): the bits of a column one after the other, lowest first."""
    columns = []
    for column in codes.t().tolist():
        number = sum(int(code) << i * bits for i, code in enumerate(column))
        words = [number >> 32 * i & 0xFFFFFFFF for i in range(math.ceil(len(column) * bits / 32))]
        columns.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(columns, dtype=torch.int32).t().contiguous()


def gptq(
    inputs: int,
    out: int,
    *,
    bits: int = 4,
    group: int = 32,
    version: int = 1,
    shuffled: bool = False,
    seed: int = 0,
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a GPTQ module `m`, and its weight (out, inputs) in float64."""
    generator = torch.Generator().manual_seed(seed)
    groups = inputs // group
    codes = torch.randint(0, 2**bits, (inputs, out), generator=generator)
    zeros = torch.randint(1, 2**bits, (groups, out), generator=generator)
    scales = (torch.rand(groups, out, generator=generator) * 0.1).half()
    index = torch.arange(inputs) // group
    if shuffled:
        index = index[torch.randperm(inputs, generator=generator)]
    tensors = {
        "m.qweight": pack_bits(codes, bits),
        "m.qzeros": pack_bits((zeros - (1 if version == 1 else 0)).t(), bits).t().contiguous(),
        "m.scales": scales,
        "m.g_idx": index.int(),
    }
    return tensors, ((codes - zeros[index]) * scales.double()[index]).t()


def awq(inputs: int, out: int, group: int = 32, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of an AWQ module `m`, and its weight (out, inputs) in float64."""
    generator = torch.Generator().manual_seed(seed)
    groups = inputs // group
    codes = torch.randint(0, 16, (inputs, out), generator=generator)
    zeros = torch.randint(0, 16, (groups, out), generator=generator)
    scales = (torch.rand(groups, out, generator=generator) * 0.1).half()

    def interleaved(values: Tensor) -> Tensor:
        order = [8 * (i // 8) + (0, 2, 4, 6, 1, 3, 5, 7)[i % 8] for i in range(out)]
        return pack_bits(values[:, order].t(), 4).t().contiguous()

    tensors = {"m.qweight": interleaved(codes), "m.qzeros": interleaved(zeros), "m.scales": scales}
    index = torch.arange(inputs) // group
    return tensors, ((codes - zeros[index]) * scales.double()[index]).t()


def four_bit(
    rows: int, columns: int, *, block: int = 64, nested: bool = False, seed: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of an NF4 module `m` of bitsandbytes, and its weight in fp32."""
    generator = torch.Generator().manual_seed(seed)
    numel = rows * columns
    codes = torch.randint(0, 16, (numel + numel % 2,), generator=generator)
    blocks = math.ceil(numel / block)
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "float16", "shape": [rows, columns]}
    tensors = {
        "m.weight": (codes[0::2] << 4 | codes[1::2]).to(torch.uint8).unsqueeze(1),
        "m.weight.quant_map": NF4.clone(),
    }
    if nested:
        scale_codes = torch.randint(0, 256, (blocks,), generator=generator)
        table, own = torch.linspace(-1, 1, 256), torch.rand(math.ceil(blocks / 16), generator=generator)
        state |= {"nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": 2.5}
        scales = table[scale_codes] * own[torch.arange(blocks) // 16] + 2.5
        tensors |= {"m.weight.absmax": scale_codes.to(torch.uint8)}
        tensors |= {"m.weight.nested_absmax": own, "m.weight.nested_quant_map": table}
    else:
        scales = torch.rand(blocks, generator=generator)
        tensors |= {"m.weight.absmax": scales}
    blob = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors |= {"m.weight.quant_state.bitsandbytes__nf4": blob}
    weight = NF4[codes[:numel]] * scales[torch.arange(numel) // block]
    return tensors, weight.view(rows, columns)


def packed(rows: int, columns: int, *, group: int = 32, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a module `m` of compressed-tensors with integers of 4 bits, and its weight in fp32."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, columns), generator=generator)
    scales = torch.rand(rows, columns // group, generator=generator)
    tensors = {
        "m.weight_packed": pack_bits((codes + 8).t(), 4).t().contiguous(),
        "m.weight_scale": scales,
        "m.weight_shape": torch.tensor([rows, columns]),
    }
    return tensors, codes * scales.repeat_interleave(group, 1)


def fp8_blocks(weight: Tensor, block: tuple[int, int] = (128, 128)) -> tuple[Tensor, Tensor]:
    """DeepSeek's rounding of a matrix: the codes, and the scale of each block; edges may be ragged."""
    rows, columns = weight.shape
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = weight[part].float().abs().max() / 448
            codes[part] = (weight[part].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales
