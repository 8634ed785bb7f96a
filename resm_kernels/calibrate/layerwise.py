"""Runs the least squares of `least_squares.py` through a decoder: block after block, for all experts at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from resm_kernels.calibrate.activations import Batch, RowFile
from resm_kernels.calibrate.blocks import Decoder, LinearLayer
from resm_kernels.calibrate.errors import CalibrationError
from resm_kernels.calibrate.least_squares import Products, StageReport, solve_stage, weighted_rows
from resm_kernels.calibrate.weights import WeightReader

Stage = list[LinearLayer]


class Expert(NamedTuple):
    """An expert, the batches of its prompts with its answers, and its architecture (often the merged model's)."""

    weights: WeightReader
    batches: Sequence[Batch]
    decoder: Decoder

    @property
    def rows(self) -> int:
        return self.batches[-1].last


@dataclass(frozen=True)
class BlockReport:
    """What was done to one block.

    Attributes:
        number: Of the block; the number of blocks stands for the output head.
        stages: The solutions.
        errors: For each expert ‖Ĥ − H‖_F / ‖H‖_F of the hidden states behind the block, rows weighted by u: how far the
            merged model is from the expert on the expert's prompts. Empty for the output head.
    """

    number: int
    stages: tuple[StageReport, ...]
    errors: tuple[float, ...]


class Layerwise:
    """The state between two blocks: hidden states of every prompt in its expert and in the merged model, in files.

    Block b reads the files of parity b mod 2 and writes those of the other parity, so that a block which was not
    finished can be done again.

    Args:
        decoder: The architecture.
        start: The merged model as it is before least squares.
        dtypes: The output's dtype of each parameter.
        experts: The experts.
        ridge: ρ.
        folder: Where hidden states and inputs are kept.
        device: Where to compute.
    """

    def __init__(
        self,
        decoder: Decoder,
        start: WeightReader,
        dtypes: Mapping[str, torch.dtype],
        experts: Sequence[Expert],
        *,
        ridge: float,
        folder: Path,
        device: torch.device | str = "cpu",
    ) -> None:
        self._decoder, self._start, self._dtypes, self._experts = decoder, start, dtypes, experts
        self._ridge, self._folder, self._device = ridge, folder, device
        self._width = 0

    @property
    def blocks(self) -> int:
        return len(self._decoder.prefixes)

    # ------------------------------------------------------------------ steps

    def enter(self, embedding: Mapping[str, Tensor]) -> None:
        """Write the hidden states before the first block; `embedding` replaces the merged model's, if it is not empty.

        Name → tensor, as `count_embedding` returns it.
        """
        names = [name for name in self._decoder.outer_parameters() if not self._is_head(name)]
        for kind in ("expert", "merged"):
            merged = {**self._start.read(names, self._device), **embedding} if kind == "merged" else None
            for t, expert in enumerate(self._experts):
                weights = expert.weights.read(names, self._device) if merged is None else merged
                decoder = self._decoder if merged is not None else expert.decoder
                for batch in expert.batches:
                    hidden = decoder.enter(batch.tokens.to(self._device), self._outer(weights))
                    self._check(hidden, expert if merged is None else None, "the embedding")
                    self._width = hidden.shape[-1]
                    self._write_states(kind, t, 0, batch, hidden)
        self._sync(0)

    def count_embedding(self) -> dict[str, Tensor]:
        """The embedding that averages the experts' by how often their prompts and answers have each token.

        Row v is Σ_t c_tv·E_tv / Σ_t c_tv, which is the least-squares solution for an embedding; rows of tokens that no
        prompt has are the merged model's.
        """
        name = self._decoder.names.embedding
        merged = self._start.read([name])[name].double()
        counts = torch.zeros(len(self._experts), len(merged), dtype=torch.float64)
        for t, expert in enumerate(self._experts):
            for batch in expert.batches:
                tokens = batch.tokens.flatten()[batch.positions]
                counts[t] += torch.bincount(tokens, minlength=len(merged))
        seen = counts.sum(0) > 0
        total = torch.zeros_like(merged)
        for t, expert in enumerate(self._experts):
            total[seen] += counts[t, seen, None] * expert.weights.read([name])[name][seen]
        merged[seen] = total[seen] / counts.sum(0)[seen, None]
        return {name: merged.to(self._dtypes[name])}

    def resume(self, width: int) -> None:
        """Go on with files that are there, of hidden states of that width."""
        self._width = width

    @property
    def width(self) -> int:
        return self._width

    def block(self, number: int) -> tuple[dict[str, Tensor], BlockReport]:
        """Solve a block: its new tensors by their full names in the output's dtypes, and the report."""
        names = list(self._decoder.block_parameters(number))
        merged = self._start.read(names, self._device)
        stages = self._find_stages(number, merged)
        inputs = [self._run_expert(number, t, names, stages) for t in range(len(self._experts))]
        solved: dict[str, Tensor] = {}
        reports = []
        for s, stage in enumerate(stages):
            merged_inputs = functools.partial(self._merged_inputs, number, merged, stage)
            new, report = self._solve(stage, merged, merged_inputs, [files[s] for files in inputs])
            solved |= new
            merged |= {name: tensor.to(self._device, torch.float32) for name, tensor in new.items()}
            reports.append(report)
            for files in inputs:
                files[s].remove()
        errors = [self._run_merged(number, t, merged) for t in range(len(self._experts))]
        self._sync(number + 1)
        return solved, BlockReport(number, tuple(reports), tuple(errors))

    def head(self) -> tuple[dict[str, Tensor], BlockReport]:
        """Solve the output head of a model that has one of its own."""
        head = self._decoder.head
        assert head is not None
        names = [name for name in self._decoder.outer_parameters() if name != self._decoder.names.embedding]
        merged = self._start.read(names, self._device)
        inputs = []
        for t, expert in enumerate(self._experts):
            weights = expert.weights.read(names, self._device)
            inputs.append(self._new_inputs(t, 0, self._width))
            for batch in expert.batches:
                hidden = self._hidden("expert", t, self.blocks, batch)
                x = expert.decoder.head_inputs(hidden, self._outer(weights))
                inputs[-1].write(batch.first, batch.pack(x))
        solved, report = self._solve(
            [head],
            merged,
            lambda t, batch: self._decoder.head_inputs(
                self._hidden("merged", t, self.blocks, batch), self._outer(merged)
            ),
            inputs,
        )
        for file in inputs:
            file.remove()
        return solved, BlockReport(self.blocks, (report,), ())

    # ------------------------------------------------------------------ inside

    def _find_stages(self, number: int, merged: Mapping[str, Tensor]) -> list[Stage]:
        # Of the batch with the most tokens: an expert of a mixture that gets all tokens of a short prompt looks like a
        # layer that sees every position.
        batch = self._experts[0].batches[-1]
        return self._decoder.stages(number, self._hidden("merged", 0, number, batch), merged)

    def _run_expert(self, number: int, t: int, names: Sequence[str], stages: Sequence[Stage]) -> list[RowFile]:
        """Run a block of an expert, and keep the inputs of its stages."""
        expert = self._experts[t]
        weights = expert.weights.read(names, self._device)
        files: list[RowFile] = []
        for batch in expert.batches:
            hidden = self._hidden("expert", t, number, batch)
            out, inputs = expert.decoder.outputs_and_inputs(number, hidden, weights, stages)
            self._check(out, expert, f"block {number}")
            self._write_states("expert", t, number + 1, batch, out)
            files = files or [self._new_inputs(t, s, x.shape[-1]) for s, x in enumerate(inputs)]
            for file, x in zip(files, inputs, strict=True):
                file.write(batch.first, batch.pack(x))
        return files

    def _merged_inputs(self, number: int, merged: Mapping[str, Tensor], stage: Stage, t: int, batch: Batch) -> Tensor:
        hidden = self._hidden("merged", t, number, batch)
        return self._decoder.stage_inputs(number, hidden, merged, [stage])[0]

    def _run_merged(self, number: int, t: int, merged: Mapping[str, Tensor]) -> float:
        """Run the finished block of the merged model on an expert's prompts; return the error of the hidden states."""
        error = length = 0.0
        for batch in self._experts[t].batches:
            out = self._decoder.block(number, self._hidden("merged", t, number, batch), merged)
            self._check(out, None, f"block {number}")
            rows = self._write_states("merged", t, number + 1, batch, out)
            wanted = self._states("expert", t, number + 1).read(batch.first, batch.last).to(rows.device)
            weights = batch.weights.to(rows.device)[:, None]
            error += float(((rows - wanted) * weights).double().square().sum())
            length += float((wanted * weights).double().square().sum())
        return math.sqrt(error / length) if length else math.inf

    def _solve(
        self,
        stage: Stage,
        merged: Mapping[str, Tensor],
        merged_inputs: Callable[[int, Batch], Tensor],
        inputs: Sequence[RowFile],
    ) -> tuple[dict[str, Tensor], StageReport]:
        ones = any(layer.has_bias for layer in stage)
        names = [name for layer in stage for name in (layer.weight, *([layer.bias] if layer.has_bias else []))]

        def products(t: int) -> Products:
            file, expert = inputs[t], self._experts[t]
            result = Products(file.shape[1] + ones, self._device)
            for batch in expert.batches:
                own = file.read(batch.first, batch.last).to(self._device)
                result.add(
                    weighted_rows(batch, merged_inputs(t, batch), ones=ones), weighted_rows(batch, own, ones=ones)
                )
            return result

        experts = (
            (lambda t=t: self._experts[t].weights.read(names, self._device), products(t))
            for t in range(len(self._experts))
        )
        return solve_stage(stage, merged, experts, self._ridge, self._dtypes)

    def _hidden(self, kind: str, t: int, number: int, batch: Batch) -> Tensor:
        rows = self._states(kind, t, number).read(batch.first, batch.last)
        return batch.unpack(rows.to(self._device))

    def _write_states(self, kind: str, t: int, number: int, batch: Batch, hidden: Tensor) -> Tensor:
        """Write a batch's hidden states before block `number`, and return them as rows."""
        rows = batch.pack(hidden)
        self._states(kind, t, number, new=batch.first == 0).write(batch.first, rows)
        return rows

    def _sync(self, number: int) -> None:
        """See to it that the hidden states before block `number` are on disk: whoever goes on from there needs them."""
        for kind in ("expert", "merged"):
            for t in range(len(self._experts)):
                self._states(kind, t, number).sync()

    def _states(self, kind: str, t: int, number: int, *, new: bool = False) -> RowFile:
        shape = (self._experts[t].rows, self._width)
        return RowFile(self._folder / f"hidden-{kind}-{t}-{number % 2}.f32", shape, new=new)

    def _new_inputs(self, t: int, s: int, width: int) -> RowFile:
        return RowFile(self._folder / f"inputs-{t}-{s}.f32", (self._experts[t].rows, width), new=True)

    def _is_head(self, name: str) -> bool:
        head = self._decoder.head
        return head is not None and name in (head.weight, head.bias)

    def _outer(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights outside of the blocks; those that are not given do not run, and are zeros that take no memory."""
        return {
            name: weights[name] if name in weights else torch.zeros(1, device=self._device).expand(shape)
            for name, shape in self._decoder.outer_parameters().items()
        }

    def _check(self, hidden: Tensor, expert: Expert | None, where: str) -> None:
        if bool(torch.isfinite(hidden).all()):
            return
        folder = self._start.folder if expert is None else expert.weights.folder
        who = "the merged model" if expert is None else str(folder)
        raise CalibrationError(
            f"{who}: {where} gives NaN or infinite hidden states; the model is damaged or overflows fp32"
        )
