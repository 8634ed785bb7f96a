"""What a report says of its models and of its own figures: what is missing, refused or differs, and how to read it.

`advice` has the warnings that come from the figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from resm_kernels.report.data import ReportWarning

_NAMED: Final = 3
"""The most tensors that a text names."""


def missing_inputs(missing: Mapping[str, str]) -> list[ReportWarning]:
    """Return a warning for each model of the recipe that cannot be found."""
    return [
        ReportWarning(
            "warning",
            "missing-input",
            f"The model {name} cannot be read: {reason}.",
            "Put it where the recipe says, or call the report from the folder that the recipe's paths count from. "
            "What needs this model is missing in the report.",
        )
        for name, reason in missing.items()
    ]


def refused(error: ValueError) -> list[ReportWarning]:
    """Return the error by which a merge of the recipe would end."""
    return [
        ReportWarning(
            "error",
            "refused",
            f"A merge of this recipe ends with an error: {error}.",
            "Do what the error says is needed; the merge writes nothing until then.",
        )
    ]


def vocabularies(differing: Mapping[str, tuple[int, int, str]]) -> list[ReportWarning]:
    """Return a warning or a note for each model with another vocabulary, as `differing_vocabularies` returns them."""
    found = []
    for folder, (moved, more, reference) in differing.items():
        parts = [f"gives {moved} rows to other tokens"] if moved else []
        parts += [f"differs in {more} rows that only one of the two has a token for"] if more else []
        found.append(
            ReportWarning(
                "warning" if moved else "note",
                "vocabulary",
                f"The tokenizer of {folder} {' and '.join(parts)}, compared with that of {reference}.",
                "Merge the vocabularies with tokenizer_source: union, or base. Without it, rows of different tokens "
                "are merged with each other.",
            )
        )
    return found


def unread_vocabulary(error: ValueError) -> list[ReportWarning]:
    """Return a warning that vocabularies could not be compared."""
    return [
        ReportWarning(
            "warning",
            "vocabulary",
            f"The models' vocabularies cannot be compared: {error}.",
            "Get the tokenizer's files anew; no model works without its tokenizer.",
        )
    ]


def unmeasured(error: ValueError) -> list[ReportWarning]:
    """Return the reason why RESM's figures are missing."""
    return [
        ReportWarning(
            "note",
            "unmeasured",
            f"Sparsity, ranks and spectra are missing: {error}.",
            "Nothing; these figures are of task vectors that RESM can merge.",
        )
    ]


def no_base(first: str) -> list[ReportWarning]:
    """Return the note that differences count from the first model."""
    return [
        ReportWarning(
            "note",
            "no-base",
            f"The recipe has no base model, so that differences count from its first model, {first}.",
            "Nothing; read each change as the difference of an expert from that model.",
        )
    ]


def calibrated() -> list[ReportWarning]:
    """Return the note that the merged model is not what the merge alone makes."""
    return [
        ReportWarning(
            "note",
            "calibrated",
            "The merged model was calibrated after the merge, so that its figures are not those of the method alone.",
            "Nothing; make a report on the recipe to see the experts alone.",
        )
    ]


def resumed(done: int, tensors: int) -> list[ReportWarning]:
    """Return the note that times are those of a part of the merge."""
    return [
        ReportWarning(
            "note",
            "resumed",
            f"The merge was cut off and went on: an earlier run had written {done} of {tensors} tensors, and times, "
            "bytes and memory are of the last run alone.",
            "Nothing; the merged model is the same as without the interruption.",
        )
    ]


def newer_inputs(models: Sequence[str]) -> list[ReportWarning]:
    """Return a note for models whose files are newer than the merged model."""
    if not models:
        return []
    return [
        ReportWarning(
            "note",
            "newer-input",
            f"Files of {', '.join(models)} are newer than the merged model, which may be of other weights.",
            "Nothing, if they are copies of the files that were merged. Otherwise merge anew, or call the report from "
            "the folder that the recipe's paths count from.",
        )
    ]


def other_tensors(names: Sequence[str]) -> list[ReportWarning]:
    """Return a warning for tensors of the recipe's output that the merged model does not have, or in another shape."""
    if not names:
        return []
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return [
        ReportWarning(
            "warning",
            "other-tensors",
            "The merged model does not have these tensors, which the recipe makes, or has them in another shape: "
            f"{', '.join(names[:_NAMED])}{more}.",
            "Check the folder with `resm-kernels verify`, and that the models are those that were merged. Figures of "
            "the merged model leave these tensors out.",
        )
    ]


def said(warnings: Sequence[str], notes: Sequence[str]) -> list[ReportWarning]:
    """Return what a merge prints about the models: how configurations differ, and what is left out or renamed."""
    return [
        *(
            ReportWarning(
                "warning",
                "configuration",
                f"{line}.",
                "Check which configuration the experts were trained with. Weights that mean different things cannot be "
                "merged to a model that works.",
            )
            for line in warnings
        ),
        *(
            ReportWarning(
                "note", "input", f"{line}.", "Nothing, if this is what was meant; --strict makes a merge refuse it."
            )
            for line in notes
        ),
    ]


def by_severity(warnings: Iterable[ReportWarning]) -> list[ReportWarning]:
    """Return warnings with the most severe first, otherwise in their order."""
    order = ("error", "warning", "note")
    return sorted(warnings, key=lambda warning: order.index(warning.severity))
