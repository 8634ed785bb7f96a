"""Calibrates a merge: merge by the recipe, let the experts answer, solve layer by layer, polish, write the model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from resm_kernels._version import __version__
from resm_kernels.calibrate.activations import make_batches
from resm_kernels.calibrate.answers import answer_prompts, check_prompts
from resm_kernels.calibrate.blocks import Decoder, model_names, without_weights
from resm_kernels.calibrate.errors import CalibrationError
from resm_kernels.calibrate.job import check_answers_folder, check_recipe, check_tokenizers, job_of
from resm_kernels.calibrate.layerwise import Expert, Layerwise
from resm_kernels.calibrate.models import load_config, load_model
from resm_kernels.calibrate.output import REPORT_FILE, Place, card_text, find_tensors, small_files, write_model
from resm_kernels.calibrate.polish import PolishOptions, PolishReport, polish, split_samples, write_targets
from resm_kernels.calibrate.prompts import Sample
from resm_kernels.calibrate.weights import WeightReader
from resm_kernels.calibrate.workfolder import WorkFolder
from resm_kernels.checkpoint import CheckpointReader, check_output_folder, read_config
from resm_kernels.checkpoint.format import parse_size
from resm_kernels.engine import MergeOptions, MergePlan, merge_checkpoints, plan_merge
from resm_kernels.engine.models import Model
from resm_kernels.engine.statistics import statistics_files
from resm_kernels.files import expanded
from resm_kernels.linalg.threads import thread_count
from resm_kernels.options import CalibrateKeywords, CalibrateOptions
from resm_kernels.recipe import RecipeSource

if TYPE_CHECKING:
    from typing_extensions import Unpack  # Python 3.11 has it in `typing`

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how much of how much is done."""

_START: Final = "start"
_EMBEDDING: Final = "embedding.safetensors"
_POLISHED: Final = "polished"
_LONG_NAME: Final = 25
"""So many characters of a model's and of a prompt file's name are in a file of answers' name."""


@dataclass(kw_only=True)
class CalibrationReport:
    """What a calibration did; the output folder has it as calibration.json.

    Attributes:
        out: The output folder.
        method: Name of the merge method that gave the start.
        prompts: Number of prompts of each expert.
        answer_tokens: Number of tokens in each expert's answers.
        blocks: The least squares, one entry for each block and, if the model has one of its own, for the output head.
        polish: The polish; None if there was none.
        seconds: Wall time by phase; of a resumed calibration, only what this process spent.
    """

    out: Path
    method: str
    prompts: tuple[int, ...]
    answer_tokens: tuple[int, ...]
    blocks: tuple[Mapping[str, Any], ...] = ()
    polish: Mapping[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def summary(self) -> str:
        """One line about the whole."""
        parts = [f"{sum(self.prompts)} prompts"]
        if self.blocks:
            errors = [block["errors"] for block in self.blocks if block["errors"]][-1]
            parts.append(f"hidden states within {' / '.join(f'{e:.1%}' for e in errors)} of the experts'")
        if self.polish is not None:
            first, kept = self.polish["evaluations"][0], self.polish["kept"]
            parts.append(f"held-out KL {_mean(first):.3f} → {_mean(kept):.3f} at step {kept['step']}")
        return f"calibrated {self.method} with {', '.join(parts)} in {sum(self.seconds.values()):.1f} s: {self.out}"


def _mean(evaluation: Mapping[str, Any]) -> float:
    return sum(evaluation["experts"]) / len(evaluation["experts"])


def calibrate_checkpoint(
    recipe: RecipeSource,
    out: str | os.PathLike[str],
    prompts: Sequence[str | os.PathLike[str]],
    *,
    progress: Progress | None = None,
    say: Callable[[Sequence[str]], None] | None = None,
    **options: Unpack[CalibrateKeywords],
) -> CalibrationReport:
    """Merge model folders as the recipe says, then calibrate the merged model on prompts, and write it to `out`.

    The experts answer their prompts themselves, so that no labels are needed. Least squares then solve every linear
    layer of every block for what the experts' layers give on their own prompts (see `least_squares.py` for the
    equations); norms and other parameters stay as the recipe merged them. A polish, if it is asked for,
    takes some steps of gradient descent on KL(expert ‖ merged model) over the answers.

    While it works, a hidden folder next to `out` keeps what is done: the start, the answers, the blocks that are
    solved. A calibration that was killed goes on from there when the same command runs again, with the same bits.

    Args:
        recipe: Path of a YAML file, a mapping of the same structure, or a `Recipe`; any method, of whole models.
        out: Folder to create.
        prompts: One file of prompts for each expert, in the recipe's order; see `read_prompts` for their format.
        progress: Called as `progress(phase, done, all)`.
        say: Called with lines about what is left out of the models, renamed or added, and what their configurations
            say differently, before the merge.
        least_squares: Whether to solve the linear layers (default: True); False leaves the polish alone.
        polish_steps: Steps of the polish; 0, the default, takes none. It needs the whole model in memory, in fp32 with
            gradients and AdamW's moments: 20 bytes for each parameter.
        answer_weight: u, the weight of positions that predict a token of the answer; others have 1. Of 1, 5 and 10,
            10 did best on the validation questions of the 3H benchmark.
        ridge: ρ, how strongly the start holds, relative to the mean square of a layer's inputs; None, the default, is
            0.001, and 0.1 before a polish, which gets further from weights that stayed nearer to the merge, as the
            validation questions of the 3H benchmark showed.
        embeddings: "token-counts", the default, averages the experts' embeddings by how often each token occurs in
            their prompts and answers, which is the least-squares solution for a layer that looks up rows; "merged"
            leaves them as the recipe merged them. The default did better on the validation questions of
            the 3H benchmark.
        learning_rate: Peak learning rate of the polish.
        held_out: The share of each expert's prompts that the polish does not train on and is stopped by.
        max_prompts: Use the first prompts of each file only, so many.
        max_prompt_tokens: Most tokens of a prompt; a longer one is an error.
        max_new_tokens: Most tokens of an answer.
        batch_tokens: Tokens that run through a block at once.
        answers: Folder where the experts' answers are kept for other calibrations; by default they are kept with the
            unfinished work, and deleted with it.
        seed: Decides which prompts are held out, and the polish's order.
        device: "cpu", "cuda" or "cuda:N".
        threads: Number of threads to compute with; None leaves torch's setting.
        max_shard_size: The most bytes of tensor data in one output file.
        overwrite: Replace `out` if it is a model folder already, when the new one is complete.
        restart: Begin anew, whatever an earlier process left unfinished.
        strict: As for `merge_checkpoints`.

    Returns:
        CalibrationReport.

    Raises:
        CalibrationError: The prompts, the models or an unfinished calibration cannot be used.
        RecipeError, CheckpointError, MergeError: As for `merge_checkpoints`.
        ValueError, TypeError: An option is out of its range; prompts are no list.

    Memory: one expert to answer (with its cache of keys and values); then one block of one expert and of the merged
    model in fp32, or their embeddings (in float64 for token counts), four float64 matrices (in, in) of the layer with
    the most inputs, four float64 copies of the weights of layers with one input, a quarter of a gigabyte of rows, and
    one batch of activations. The number of blocks and of prompts has no influence. Hidden states and the inputs of one
    block's layers are on disk, in fp32.

    Deterministic: the same models, prompts, options and number of threads give the same bits on one kind of device.
    """
    chosen = CalibrateOptions(**options)
    if isinstance(prompts, (str, os.PathLike)):
        raise TypeError(f"prompts: got {os.fspath(prompts)!r}, need a list with one file for each expert")
    files = [expanded(path, CalibrationError, "prompts") for path in prompts]
    shard_bytes = parse_size(chosen.max_shard_size, "max_shard_size")
    device = _device(chosen.device)
    with plan_merge(recipe, None, MergeOptions(threads=chosen.threads, strict=chosen.strict)) as plan:
        if say is not None:
            say(plan.said)
        check_recipe(plan, files)
        inputs = [*plan.models.folders, *statistics_files(plan.statistics), *files]
        target = check_output_folder(out, overwrite=chosen.overwrite, inputs=inputs, goes_on=False)
        config = load_config(plan.reference)
        # What is wrong with prompts and models is said now, not after the merge.
        if chosen.answers is not None:
            check_answers_folder(expanded(chosen.answers, CalibrationError, "answers"), target)
        check_tokenizers(plan)
        for model, file in zip(plan.experts, files, strict=True):
            check_prompts(
                model,
                file,
                max_new_tokens=chosen.max_new_tokens,
                max_prompt_tokens=chosen.max_prompt_tokens,
                max_prompts=chosen.max_prompts,
            )
        decoder = Decoder(config, device) if chosen.least_squares else None
        if decoder is not None:
            for model in plan.experts:
                _weights(model, decoder)
        unfinished = WorkFolder(target, job_of(plan, files, chosen), restart=chosen.restart)
        with unfinished as work, thread_count(chosen.threads):
            job = _Calibration(plan, files, chosen, target, work, device, config, decoder, shard_bytes, progress)
            report = job.run()
            work.remove()
    return report


class _Calibration:
    """One calibration, step by step; every step looks whether it was done already."""

    def __init__(
        self,
        plan: MergePlan,
        files: Sequence[Path],
        options: CalibrateOptions,
        out: Path,
        work: WorkFolder,
        device: torch.device,
        config: Any,
        decoder: Decoder | None,
        shard_bytes: int,
        progress: Progress | None,
    ) -> None:
        self._plan, self._files, self._options, self._out, self._work = plan, files, options, out, work
        self._device, self._config, self._decoder, self._shard_bytes = device, config, decoder, shard_bytes
        self._progress: Progress = progress or (lambda phase, done, total: None)
        self._seconds: dict[str, float] = {}

    def run(self) -> CalibrationReport:
        with self._timed("merging"):
            start = self._merge()
        with self._timed("answering"):
            samples = [self._answers(t) for t in range(len(self._files))]
            self._check_samples(samples)
        with contextlib.closing(start.reader):
            if self._decoder is not None:
                with self._timed("least squares"), torch.no_grad():
                    self._least_squares(start, samples, self._decoder)
            if self._options.polish_steps:
                with self._timed("polishing"):
                    self._polish(start, samples)
            with self._timed("writing"):
                report = CalibrationReport(
                    out=self._out,
                    method=self._plan.method.name,
                    prompts=tuple(len(own) for own in samples),
                    answer_tokens=tuple(sum(len(s.tokens) - s.answer_start for s in own) for own in samples),
                    blocks=tuple(self._work.state.get("blocks", ())),
                    polish=self._work.state.get("polish"),
                )
                files = self._files_of(start, report)
                self._write(start, self._out, files, "writing", overwrite=self._options.overwrite)
        report.seconds = self._seconds
        return report

    # ------------------------------------------------------------------ steps

    def _merge(self) -> Model:
        folder = self._work.path / _START
        if not folder.is_dir():
            merge_checkpoints(
                self._plan.recipe,
                folder,
                threads=self._options.threads,
                progress=lambda done, total: self._progress("merging", done, total),
            )
        return Model(folder, CheckpointReader(folder), read_config(folder), folder)

    def _answers(self, t: int) -> list[Sample]:
        expert, file = self._plan.experts[t], self._files[t]
        folder = (
            self._work.path
            if self._options.answers is None
            else expanded(self._options.answers, CalibrationError, "answers")
        )
        # File systems allow names of 255 bytes. Of two files with one name the later replaces the earlier.
        cache = folder / f"answers-{t}-{expert.folder.name[:_LONG_NAME]}-{file.stem[:_LONG_NAME]}.safetensors"
        return answer_prompts(
            expert,
            file,
            cache,
            device=self._device,
            max_new_tokens=self._options.max_new_tokens,
            max_prompt_tokens=self._options.max_prompt_tokens,
            batch_tokens=self._options.batch_tokens,
            max_prompts=self._options.max_prompts,
            progress=lambda done, total: self._progress(f"answers of {expert.folder.name}", done, total),
        )

    def _check_samples(self, samples: Sequence[Sequence[Sample]]) -> None:
        """Refuse too few samples, and other answers than those that the unfinished work began with.

        Another device may give other answers, and so may another process that uses the same folder of answers.
        """
        if self._options.polish_steps:
            for file, own in zip(self._files, samples, strict=True):
                if len(own) < 2:
                    raise CalibrationError(
                        f"{file}: got {len(own)} prompt, need at least 2 for a polish: one to train on, one to hold out"
                    )
        content = json.dumps([[[s.tokens, s.answer_start] for s in own] for own in samples])
        digest = hashlib.sha256(content.encode()).hexdigest()
        if self._work.state.get("samples", digest) != digest:
            raise CalibrationError(
                f"{self._work.path}: holds an unfinished calibration with other answers of the experts; run it on the "
                "same device as then, or pass --restart to begin anew"
            )
        self._work.save(samples=digest)

    def _least_squares(self, start: Model, samples: Sequence[Sequence[Sample]], decoder: Decoder) -> None:
        weights = _weights(start, decoder)
        experts = [
            Expert(
                _weights(model, decoder),
                make_batches(self._fitted(own, t), self._options.answer_weight, self._options.batch_tokens),
                self._decoder_of(model, decoder),
            )
            for t, (model, own) in enumerate(zip(self._plan.experts, samples, strict=True))
        ]
        dtypes = {name: start.reader.tensors[weights.stored_name(name)].dtype for name in decoder.parameters()}
        layerwise = Layerwise(
            decoder,
            weights,
            dtypes,
            experts,
            ridge=self._options.chosen_ridge,
            folder=self._work.path,
            device=self._device,
        )
        state = self._work.state
        steps = layerwise.blocks + (decoder.head is not None)
        if "width" in state:
            layerwise.resume(state["width"])
        else:
            embedding = layerwise.count_embedding() if self._options.embeddings == "token-counts" else {}
            stored = {weights.stored_name(name): tensor for name, tensor in embedding.items()}
            self._work.save_tensors(_EMBEDDING, stored)
            layerwise.enter({name: tensor.to(self._device, torch.float32) for name, tensor in embedding.items()})
            self._work.save(width=layerwise.width, blocks=[])
        while (done := len(state["blocks"])) < steps:
            self._progress("blocks", done, steps)
            solved, report = layerwise.block(done) if done < layerwise.blocks else layerwise.head()
            stored = {weights.stored_name(name): tensor for name, tensor in solved.items()}
            self._work.save_tensors(_block_file(done), stored)
            self._work.save(blocks=[*state["blocks"], asdict(report)])
        self._progress("blocks", steps, steps)

    def _fitted(self, samples: Sequence[Sample], t: int) -> Sequence[Sample]:
        """The samples that least squares see: none that a polish holds out, which would look too good there."""
        if not self._options.polish_steps:
            return samples
        kept, _ = split_samples(len(samples), self._options.held_out, self._options.seed, t)
        return [samples[i] for i in kept]

    def _decoder_of(self, model: Model, decoder: Decoder) -> Decoder:
        """The decoder of an expert whose config computes something else than the merged model's."""
        config = load_config(model)
        return decoder if _comparable(config) == _comparable(self._config) else Decoder(config, self._device)

    def _polish(self, start: Model, samples: Sequence[Sequence[Sample]]) -> None:
        if "polish" in self._work.state:
            return
        targets = []
        for t, (model, own) in enumerate(zip(self._plan.experts, samples, strict=True)):
            targets.append(self._work.path / f"targets-{t}.npy")
            if not targets[-1].is_file():
                self._progress("targets", t, len(samples))
                expert = load_model(model, dtype=torch.float32, device=self._device)
                write_targets(expert, own, targets[-1], batch_tokens=self._options.batch_tokens)
                del expert
        folder = self._work.path / "solved"
        if not folder.is_dir():
            self._write(start, folder, small_files(start.folder), "preparing")
        with contextlib.closing(CheckpointReader(folder)) as reader:
            student = load_model(Model(folder, reader, start.config, folder), dtype=torch.float32, device=self._device)
        options = PolishOptions(
            steps=self._options.polish_steps,
            learning_rate=self._options.learning_rate,
            held_out=self._options.held_out,
            seed=self._options.seed,
        )
        report: PolishReport = polish(
            student, samples, targets, options, lambda done, total: self._progress("polishing", done, total)
        )
        self._work.save_model(_POLISHED, student)
        self._work.save(polish=asdict(report))

    # ------------------------------------------------------------------ output

    def _calibrated(self, start: Model) -> dict[str, Place]:
        """The tensors that are not the start's."""
        if "polish" in self._work.state:
            files = sorted((self._work.path / _POLISHED).glob("*.safetensors"))
        else:
            blocks = range(len(self._work.state.get("blocks", ())))
            files = [self._work.path / name for name in (_EMBEDDING, *map(_block_file, blocks))] if blocks else []
        names = model_names(without_weights(self._config)) if self._decoder is None else self._decoder.names
        return find_tensors(files, start.reader.tensors, names)

    def _write(
        self, start: Model, out: Path, files: Mapping[str, bytes], phase: str, *, overwrite: bool = False
    ) -> None:
        write_model(
            start.reader,
            self._calibrated(start),
            out,
            files,
            self._shard_bytes,
            lambda done, total: self._progress(phase, done, total),
            overwrite=overwrite,
        )

    def _files_of(self, start: Model, report: CalibrationReport) -> dict[str, bytes]:
        files = small_files(start.folder)
        entry = {k: v for k, v in asdict(report).items() if k not in ("out", "seconds")}
        entry |= {"version": __version__, "options": self._options.job()}
        files[REPORT_FILE] = (json.dumps(entry, indent=1) + "\n").encode()
        if "README.md" in files:
            card = files["README.md"].decode().replace(f"# {_START}\n", f"# {self._out.name}\n")
            files["README.md"] = card.replace("\n## Models\n", f"\n{card_text(self._options)}\n\n## Models\n").encode()
        return files

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds[phase] = time.perf_counter() - began


def _weights(model: Model, decoder: Decoder) -> WeightReader:
    return WeightReader(model.folder, model.reader, decoder.names.base_prefix, decoder.parameters())


def _block_file(number: int) -> str:
    return f"block-{number:05d}.safetensors"


def _comparable(config: Any) -> dict[str, Any]:
    """A configuration's entries that may change what the model computes.

    Whether the output head is tied is not among them: an expert's head is read as a tensor if the output has one.
    """
    ignored = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"}
    ignored.add("tie_word_embeddings")
    return {k: v for k, v in config.to_dict().items() if k not in ignored and not k.endswith("_token_id")}


def _device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: got {name!r}, need cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {name!r}, need cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {name!r}, but torch sees {torch.cuda.device_count()} GPUs")
    return device
