"""What merges of 70 B, 405 B and 1 T parameters cost on 1, 8 and 64 machines: the table of docs/ray.md.

There are no weights: the tensors' shapes follow from each model's config, and the times from the rates of one machine,
by default those of the reference machine. Base and three experts are in bf16.

    python -m benchmarks.estimate_sizes [--machine FILE.json|measure]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from resm_kernels.engine.costs import Machine, Work, is_matrix_method, tensor_work
from resm_kernels.engine.estimate import MACHINES, chosen_machine, duration, estimate, machine_line
from resm_kernels.methods import get
from resm_kernels.tensor_names import is_vocabulary

EXPERTS: Final = 3
METHODS: Final = ("linear", "ties", "resm")
_BYTES: Final = 2


@dataclass(frozen=True)
class Config:
    """The numbers of a config.json from which the shapes of a Llama or of a DeepSeek-like mixture follow.

    Attributes:
        hidden, intermediate, layers, vocabulary: As in any config.
        key_values: Rows of k_proj and v_proj together with their size: number of heads × size of a head.
        experts: Feed-forward experts in each layer but the first, of `expert_intermediate` rows, beside one shared one;
            0 for a dense model.
        latents: For latent attention the shapes of its matrices; empty for q, k, v and o.
    """

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    key_values: int = 0
    experts: int = 0
    expert_intermediate: int = 0
    latents: tuple[tuple[int, int], ...] = ()


CONFIGS: Final = {
    "70 B (Llama 3)": Config(8192, 28672, 80, 128256, key_values=1024),
    "405 B (Llama 3.1)": Config(16384, 53248, 126, 128256, key_values=1024),
    "1 T (mixture of 384 experts)": Config(
        7168,
        18432,
        61,
        163840,
        experts=384,
        expert_intermediate=2048,
        latents=((1536, 7168), (12288, 1536), (576, 7168), (16384, 512), (7168, 8192)),
    ),
}


def shapes(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the model's weights."""
    hidden = config.hidden
    yield "model.embed_tokens.weight", (config.vocabulary, hidden)
    for i in range(config.layers):
        layer = f"model.layers.{i}."
        attention = config.latents or ((hidden, hidden), *[(config.key_values, hidden)] * 2, (hidden, hidden))
        for j, shape in enumerate(attention):
            yield f"{layer}self_attn.{j}.weight", shape
        is_dense = not config.experts or i == 0
        for expert in range(1 if is_dense else config.experts + 1):
            rows = config.intermediate if is_dense else config.expert_intermediate
            for name, shape in (("gate", (rows, hidden)), ("up", (rows, hidden)), ("down", (hidden, rows))):
                yield f"{layer}mlp.{expert}.{name}_proj.weight", shape
        if not is_dense:
            yield f"{layer}mlp.gate.weight", (config.experts, hidden)
        for norm in ("input", "post_attention"):
            yield f"{layer}{norm}_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config.vocabulary, hidden)


def parameters(config: Config) -> int:
    """The number of the model's parameters."""
    return sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for _, shape in shapes(config))


def works(config: Config, method: str) -> Iterator[Work]:
    """What each tensor costs when base and experts of these shapes are merged with the method's defaults."""
    chosen = get(method)
    models = EXPERTS + chosen.needs_base
    for name, shape in shapes(config):
        nbytes = _BYTES * shape[0] * (shape[1] if len(shape) > 1 else 1)
        spectral = is_matrix_method(chosen) and len(shape) == 2 and not is_vocabulary(name)
        yield tensor_work(method, shape, EXPERTS, models * nbytes, nbytes, spectral=spectral)


def table(machine: Machine) -> str:
    """The table in Markdown: for each model and method the time on each number of machines, and its limit."""
    heads = ("model", "method", "read", "written", *(f"{n} machine{'s' if n > 1 else ''}" for n in MACHINES))
    rows = [heads, tuple("---" for _ in heads)]
    for name, config in CONFIGS.items():
        for method in METHODS:
            costs = list(works(config, method))
            times = [estimate(costs, machine, n) for n in MACHINES]
            read, written = sum(w.read for w in costs), sum(w.written for w in costs)
            sizes = (f"{read / 1e12:.2f} TB", f"{written / 1e12:.2f} TB")
            rows.append((name, method, *sizes, *(f"{duration(t.seconds)} ({t.limit})" for t in times)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Print the table, and the rates that it holds for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", help="measure, or a JSON file of rates (default: the reference machine)")
    options = parser.parse_args()
    machine, source = chosen_machine(options.machine, Path("here"), None)
    print(f"{source}: {machine_line(machine)}\n\n{table(machine)}")


if __name__ == "__main__":
    main()
