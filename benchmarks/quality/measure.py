"""Measure one seed: score every grid on validation, choose, then ask each chosen candidate the test questions once.

The order is the guarantee. `choose` gets validation scores and nothing else, all choices are made and written
down before the first test question is asked, and each candidate is asked them once, whatever rows it stands in.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.quality.ablation import ablation_rows
from benchmarks.quality.calibrated import calibrated_rows, reference_rows
from benchmarks.quality.calibrating import Calibrator
from benchmarks.quality.candidates import SFT, Candidate, Row, default_rows, stored_rows, tuned_rows
from benchmarks.quality.evaluate import evaluate, load
from benchmarks.quality.hypotheses import CALIBRATED, HYPOTHESES, named_rows
from benchmarks.quality.merging import Models, StateDict, digest, merge
from benchmarks.quality.records import Record, RecordName, Scores, Split, rounded
from benchmarks.quality.searched import Searcher, searched_rows
from benchmarks.quality.sizes import move
from benchmarks.quality.world import World
from resm_kernels.methods.resm import layer_plan

HERE: Final = Path(__file__).resolve().parent
ASKING: Final = tuple(HERE / name for name in ("words.py", "world.py", "evaluate.py", "sizes.py"))


def _sources(*packages: str) -> tuple[Path, ...]:
    """The modules of the library's packages."""
    folders = [HERE.parents[1] / "resm_kernels" / package for package in packages]
    return tuple(path for folder in folders for path in sorted(folder.glob("*.py")))


MERGING: Final = _sources("methods", "elementwise", "spectral")
"""What scores depend on beside the models: the questions and their marking, and what methods and their defaults are."""
CALIBRATING: Final = (*MERGING, *_sources("calibrate"), HERE / "prompts.py", HERE / "calibrating.py")
"""What those of calibrated merges depend on: the prompts and what is done with them as well."""
SEARCHING: Final = (*MERGING, *_sources("live", "search"), HERE / "searched.py")
"""What those of searched merges depend on: how trials are proposed and which are the best as well."""
Ask = Callable[[StateDict, Split], Mapping[str, float]]
Calibrate = Callable[[Candidate], StateDict]


def all_rows() -> list[Row]:
    """Every row of every table."""
    return [*stored_rows(), *default_rows(), *tuned_rows(), *ablation_rows()]


def choose(candidates: Sequence[Candidate], validation: Mapping[str, Scores]) -> str:
    """The key of the candidate with the best average on validation, the first of equals."""
    return max((c.key for c in candidates), key=lambda key: validation[key]["average"])


class Asker:
    """Asks a state dictionary the questions of a split; one module serves all of them."""

    def __init__(self, folder: Path, world: World, device: str = "cpu") -> None:
        self.world = world
        model, self._tokenizer = load(folder / "base")
        self._model = move(model, device=device)

    def __call__(self, model: StateDict, split: Split) -> Mapping[str, float]:
        keys = self._model.load_state_dict(model, strict=False)
        tensors = self._model.state_dict()
        # A checkpoint stores no tensor for a tied output head.
        missing = [k for k in keys.missing_keys if tensors[k].data_ptr() not in {tensors[m].data_ptr() for m in model}]
        if missing or keys.unexpected_keys:
            raise ValueError(f"model: missing {missing}, unexpected {keys.unexpected_keys}; need the base's tensors")
        return evaluate(self._model, self._tokenizer, self.world, split)

    def questions(self) -> dict[str, dict[str, int]]:
        """How many questions of each kind the splits have."""
        splits: tuple[Split, ...] = ("valid", "test")
        return {split: dict(Counter(item.kind for item in self.world.questions(split))) for split in splits}


class Measurement:
    """One seed being measured; `record` grows, and is saved after every answer.

    `calibrate` makes the merges that use prompts or search with questions; None serves rows that have none.
    """

    def __init__(
        self, folder: Path, models: Models, ask: Ask, record: Record, calibrate: Calibrate | None = None
    ) -> None:
        self.folder, self.models, self.ask, self.record = folder, models, ask, record
        self._calibrate = calibrate
        self._by_digest: dict[tuple[str, Split], Scores] = {}

    def score(self, candidate: Candidate, split: Split) -> Scores:
        """The candidate's scores, from the record if they are there."""
        known = self.record.of(split)
        if candidate.key not in known:
            begin = time.process_time()
            model = self._merge(candidate)
            merged = time.process_time()
            self.record.cost(candidate.key, merged - begin)
            same = digest(model), split
            if same not in self._by_digest:
                self._by_digest[same] = rounded(self.ask(model, split))
            self.record.spend("merging", merged - begin)
            self.record.spend(f"asking, {split}", time.process_time() - merged)
            known[candidate.key] = self._by_digest[same]
            self.record.save(self.folder)
        return known[candidate.key]

    def _merge(self, candidate: Candidate) -> StateDict:
        if candidate.calibration is None and candidate.search is None:
            return merge(self.models, candidate)
        if self._calibrate is None:
            raise ValueError(f"calibrate: got None, need what merges {candidate.key}")
        return self._calibrate(candidate)

    def run(self, rows: Iterable[Row]) -> Record:
        """Validation, choices, test; in that order."""
        rows = list(rows)
        for row in rows:
            if len(row.candidates) > 1:
                for candidate in row.candidates:
                    self.score(candidate, "valid")
                self.record.choices[f"{row.group}/{row.name}"] = choose(row.candidates, self.record.valid)
        self.record.save(self.folder)
        for row in rows:
            self.score(chosen(row, self.record), "test")
        return self.record


def chosen(row: Row, record: Record) -> Candidate:
    """The row's only candidate, or the one that validation chose."""
    if len(row.candidates) == 1:
        return row.candidates[0]
    key = record.choices[f"{row.group}/{row.name}"]
    return next(c for c in row.candidates if c.key == key)


def layers(models: Models) -> list[dict[str, Any]]:
    """What RESM with β = 1 would see in every matrix, embeddings too: sparsity, outlier mass, weights, ranks."""
    rows = []
    for name, start in models["base"].items():
        plan = layer_plan(start, [models[expert][name] for expert in SFT], spectral=True, beta=1.0)
        if plan.spectral:
            figures = {"sparsity": plan.sparsity, "outlier_mass": plan.outlier_mass, "weights": plan.weights}
            small = {key: [float(f"{v:.4g}") for v in values] for key, values in figures.items()}
            rows.append({"name": name, "shape": list(plan.shape), **small, "ranks": plan.ranks})
    return rows


def rows_of(record: RecordName) -> list[Row]:
    """What a record measures: everything, or on fresh seeds what the claims compare, calibrated or not."""
    match record:
        case "development":
            return all_rows()
        case "confirmation":
            return named_rows(all_rows(), HYPOTHESES)
        case "calibrated":
            return calibrated_rows()
        case "calibrated-confirmation":
            claimed = named_rows(calibrated_rows(), CALIBRATED)
            return list(dict.fromkeys([*reference_rows(), *claimed]))
        case "searched":
            return searched_rows()


def models_of(rows: Iterable[Row]) -> list[str]:
    """The folders that the rows need."""
    needed = dict.fromkeys(name for row in rows for c in row.candidates for name in c.experts)
    return list(dict.fromkeys(["base", *needed]))


def measure_seed(folder: Path, seed: int, record: RecordName, device: str) -> Record:
    """Measure the rows of one seed's folder, or what is missing of them, on one thread."""
    torch.set_num_threads(1)
    models, rows = Models(folder), rows_of(record)
    calibrated = record.startswith("calibrated")
    # A folder of its own, so that no record of the seed's models takes the place of another.
    kept = folder / "calibrated" if calibrated else folder / record if record == "searched" else folder
    kept.mkdir(exist_ok=True)
    sources = CALIBRATING if calibrated else SEARCHING if record == "searched" else MERGING
    scores = Record.open(kept, models.fingerprint(models_of(rows), *ASKING, *sources))
    world = World(seed)
    ask = Asker(folder, world, device)
    scores.questions = ask.questions()
    if kept == folder:
        scores.layers = layers(models)
    make: Calibrate | None = Calibrator(folder, world, kept / "scratch") if calibrated else None
    if record == "searched":
        make = Searcher(folder, world, kept / "scratch")
    return Measurement(kept, models, ask, scores, make).run(rows)
