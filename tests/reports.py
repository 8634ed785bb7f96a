"""Made-up reports, as large and as odd as a page must be able to show."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from resm_kernels.report import Cell, Measure, Memory, Report, ReportWarning, Spectra, Stage
from resm_kernels.report.data import Value
from resm_kernels.report.measures import MEASURES

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
COLUMNS = ["embed_tokens", NORMS[0], *MATRICES[:4], NORMS[1], *MATRICES[4:], "norm", "lm_head"]
EXPERTS = ["lab/Model-8B-helpful", "lab/Model-8B-honest", "./checkpoints/harmless/final"]
_OF_MATRICES = {"rank", "rank_90", "effective_rank", "interference", "interference_ratio"}


def spectra(tensor: str, generator: random.Random, experts: int, size: int = 4096) -> Spectra:
    indices = sorted({round(size ** (k / 63)) for k in range(64)})
    powers = [generator.uniform(0.3, 0.9) for _ in range(experts)]
    floats = [generator.uniform(1, 90) for _ in range(experts)]
    pairs = [[1.0 if s == t else 0.1 for s in range(experts)] for t in range(experts)]
    values = [[math.exp(-i / size) * i**-p for i in indices] for p in powers]
    ranks = [300] * experts, [2100] * experts
    return Spectra(
        tensor,
        size,
        list(range(experts)),
        indices,
        values,
        *[floats] * 3,
        *ranks,
        powers,
        [256] * experts,
        *[pairs] * 4,
        0.21,
        0.06,
    )


def cell(row: str, column: str, tensor: str, shape: str, generator: random.Random, experts: int) -> Cell:
    """A cell with made-up numbers, and with spectra if its shape is square. Numbers change slowly with depth."""
    is_matrix = shape == "4096×4096"
    depth = int(row) / 32 if row.isdigit() else 1.0
    level = 0.3 + 0.3 * math.sin(len(column) + 2.5 * depth)

    def number(measure: Measure) -> float:
        share = min(1.0, max(0.0, level + generator.uniform(-0.15, 0.15)))
        if measure.scale == "logarithmic":
            return 0.002 * 100**share
        return share if measure.centre is None else measure.centre + share - 0.3

    values: dict[str, Value] = {
        measure.key: [number(measure) for _ in range(experts)] if measure.per_expert else number(measure)
        for measure in MEASURES
        if is_matrix or measure.key not in _OF_MATRICES
    }
    drawn = spectra(tensor, generator, experts) if is_matrix else None
    return Cell(row, column, [tensor], shape, "linear" if is_matrix else "scale", values, drawn)


def partly_damaged(good: Cell) -> Cell:
    problem = "an expert has values that are not finite"
    values = {key: [None, *value[1:]] if isinstance(value, list) else value for key, value in good.values.items()}
    return replace(good, values=values, problem=problem)


def damaged(good: Cell, experts: int) -> Cell:
    problem = "the tensor of the second expert has values that are not finite"
    return Cell(good.row, good.column, good.tensors, good.shape, "", {"change": [math.nan] * experts}, None, problem)


def report(
    layers: int = 32, experts: list[str] | None = None, *, warnings: list[ReportWarning] | None = None
) -> Report:
    """A report shaped like that of an 8 B model: seven matrices and two norms a layer, embeddings, last norm, head."""
    generator = random.Random(layers)
    experts = EXPERTS if experts is None else experts
    count = len(experts)
    cells = [cell("embeddings", "embed_tokens", "model.embed_tokens.weight", "128256×4096", generator, count)]
    for layer in range(layers):
        for kind in COLUMNS[1:-2]:
            owner = {"norm": "", "proj": "self_attn." if kind[0] in "qkvo" else "mlp."}[kind[-4:]]
            shape = "4096" if kind in NORMS else "4096×4096"
            cells.append(cell(str(layer), kind, f"model.layers.{layer}.{owner}{kind}.weight", shape, generator, count))
    cells.append(cell("final", "norm", "model.norm.weight", "4096", generator, count))
    cells.append(cell("final", "lm_head", "lm_head.weight", "128256×4096", generator, count))
    place = next(i for i, c in enumerate(cells) if c.column == "k_proj")
    cells[place] = damaged(cells[place], count)
    place = next(i for i, c in enumerate(cells) if c.column == "v_proj")
    cells[place] = partly_damaged(cells[place])
    models = "".join(f"  - model: {expert}\n    parameters: {{weight: 1.0}}\n" for expert in experts)
    return Report(
        title="helpful-honest-harmless",
        version="0.2.0",
        recipe=f"# Three experts\nmerge_method: resm\nbase_model: lab/Model-8B\nmodels:\n{models}dtype: bfloat16\n",
        method="resm",
        base="lab/Model-8B",
        experts=experts,
        out="./merged",
        rows=["embeddings", *map(str, range(layers)), "final"],
        columns=COLUMNS,
        measures=list(MEASURES),
        cells=cells,
        stages=[Stage("reading", 31.25, 64 << 30), Stage("computing", 412.5), Stage("writing", 18.75, 16 << 30)],
        memory=Memory(5 << 30, 4 << 30),
        machine={"processor": "x86_64, AVX-512", "threads": "16", "system": "Linux", "torch": "2.13.0"},
        warnings=findings(layers) if warnings is None else warnings,
    )


def findings(layers: int) -> list[ReportWarning]:
    return [
        ReportWarning(
            "error",
            "non-finite",
            "model.layers.0.self_attn.k_proj.weight of an expert holds 12 values that are not finite (NaN).",
            "Take the expert's file from its source again, or leave the expert out of the recipe.",
            [("0", "k_proj")],
        ),
        ReportWarning(
            "warning",
            "one expert dominates",
            "One expert has 97 % of the weight in these matrices, so the merge is nearly that expert there.",
            "Set weights in the recipe, or set beta to 1.",
            [(str(i), "down_proj") for i in range(min(14, layers))],
        ),
        ReportWarning(
            "note",
            "vocabulary",
            "The experts' vocabularies differ from the base's in 3 tokens.",
            "Nothing, if those tokens are not used; else set tokenizer_source: union.",
        ),
    ]


HOSTILE = "</script><img src=x onerror=alert(1)>\u2028{{ 7*7 }}<!-- \"'&"


def hostile() -> Report:
    """A report in which every name and text is an attempt to run code."""
    good = cell("0", HOSTILE, HOSTILE, "4096×4096", random.Random(0), 2)
    values = good.values | {"change": None}
    bad = Cell("0", HOSTILE, [HOSTILE] * 3, HOSTILE, HOSTILE, values, good.spectra, HOSTILE, {"change": HOSTILE})
    return Report(
        title=HOSTILE,
        version=HOSTILE,
        recipe=HOSTILE,
        method=HOSTILE,
        base=HOSTILE,
        experts=[HOSTILE, "x" * 300],
        out=HOSTILE,
        rows=["0"],
        columns=[HOSTILE],
        measures=[Measure("change", HOSTILE, HOSTILE, HOSTILE, "sequential", True)],
        cells=[bad],
        stages=[Stage(HOSTILE, 0.0, 7)],
        memory=Memory(None, 1),
        machine={HOSTILE: HOSTILE},
        warnings=[ReportWarning("error", HOSTILE, HOSTILE, HOSTILE, [("0", HOSTILE)])],
    )


def worst() -> Report:
    """Many warnings and long names, with which a page must still be readable."""
    long = "an-organisation-with-a-very-long-name/A-Model-Whose-Name-Does-Not-End-70B-Instruct-v3.1-preview-"
    texts = [
        ("error", "non-finite", "model.layers.3.self_attn.q_proj.weight of expert 2 holds values that are not finite."),
        ("warning", "equal to base", "Expert 1 equals the base in every tensor, so it only dilutes the others."),
        ("warning", "norm out of line", "The change of the merged model is 14 times that of its experts in these."),
        ("note", "configuration", "rope_scaling.factor is 8 in the base and 32 in an expert."),
    ]
    todo = "Look at these places, and decide whether the recipe means what you want."
    found = [
        ReportWarning(severity, kind, f"{text} ({i})", todo, [(str(r), MATRICES[r % 7]) for r in range(3 * i % 24)])
        for severity, kind, text in texts
        for i in range(5)
    ]
    return report(24, [f"{long}{i}" for i in range(6)], warnings=found)
