"""Merges that use prompts: model folders and files of prompts in, a model folder out, whose tensors are read back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import resm_kernels
from benchmarks.quality.calibrated import START
from benchmarks.quality.candidates import Calibration, Candidate
from benchmarks.quality.merging import Models, StateDict, scratch_folder
from benchmarks.quality.prompts import DRAWS, Draw, Prompt, draw_prompts
from benchmarks.quality.sizes import MAX_NEW_TOKENS
from benchmarks.quality.world import KINDS_OF, World
from resm_kernels import methods
from resm_kernels.calibrate import calibrate_checkpoint
from resm_kernels.calibrate.statistics import compute_statistics
from resm_kernels.methods import Method


class Calibrator:
    """Calibrates candidates of one seed, each from the beginning: no candidate's time is spent by another.

    Args:
        models: The seed's folder of models.
        world: The seed's world, which draws the prompts.
        scratch: A folder that is made for a candidate's files, and removed when the candidate is done.
    """

    def __init__(self, models: Path, world: World, scratch: Path) -> None:
        self._models, self._scratch = models.resolve(), scratch
        self._drawn: dict[tuple[str, Draw], list[Prompt]] = {
            (expert, draw): draw_prompts(world, expert, draw) for expert in KINDS_OF for draw in DRAWS
        }

    def __call__(self, candidate: Candidate) -> StateDict:
        """The tensors of a candidate that has a calibration."""
        calibration = candidate.calibration
        if calibration is None or candidate.method is None:
            raise ValueError(f"candidate: got {candidate.key}, need a merge with a calibration")
        with scratch_folder(self._scratch):
            return self._merge(candidate, candidate.method, calibration)

    def _merge(self, candidate: Candidate, method: str, calibration: Calibration) -> StateDict:
        prompts = [self._write_prompts(expert, calibration) for expert in candidate.experts]
        out = self._scratch / "merged"
        if calibration.least_squares or calibration.polish_steps:
            calibrate_checkpoint(
                self._recipe(candidate),
                out,
                prompts,
                least_squares=calibration.least_squares,
                polish_steps=calibration.polish_steps,
                max_new_tokens=MAX_NEW_TOKENS,
            )
        else:
            statistics = self._write_statistics(candidate, methods.get(method), prompts)
            resm_kernels.merge_checkpoints(self._recipe(candidate, statistics), out)
        return Models(self._scratch)[out.name]

    def _write_prompts(self, expert: str, calibration: Calibration) -> Path:
        drawn = self._drawn[expert, calibration.draw][: calibration.prompts]
        file = self._scratch / f"{expert}.jsonl"
        file.write_text("".join(json.dumps({"prompt": prompt.text}) + "\n" for prompt in drawn))
        return file

    def _write_statistics(self, candidate: Candidate, method: Method, prompts: Sequence[Path]) -> list[Path]:
        assert method.statistics is not None
        models = [self._models / expert for expert in candidate.experts]
        if method.statistics_model == "merged":
            start = self._scratch / "start"
            resm_kernels.merge_checkpoints(self._recipe(replace(START, experts=candidate.experts)), start)
            models = [start] * len(models)
        files = [file.with_suffix(".safetensors") for file in prompts]
        for expert, model, questions, file in zip(candidate.experts, models, prompts, files, strict=True):
            # A merged model reads the experts' answers, so that all ways see the same tokens.
            compute_statistics(
                model,
                file,
                questions,
                kind=method.statistics,
                answers_by=self._models / expert if method.statistics_model == "merged" else None,
                max_new_tokens=MAX_NEW_TOKENS,
            )
        return files

    def _recipe(self, candidate: Candidate, statistics: Sequence[Path] = ()) -> dict[str, Any]:
        entries: list[dict[str, str]] = [{"model": str(self._models / expert)} for expert in candidate.experts]
        for entry, file in zip(entries, statistics, strict=False):
            entry["statistics"] = str(file)
        return {
            "merge_method": candidate.method,
            "base_model": str(self._models / "base"),
            "models": entries,
            "parameters": {name.rstrip("_"): value for name, value in candidate.parameters},
            "dtype": "bfloat16",
        }
