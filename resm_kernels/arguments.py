"""Arguments and options of the command line that several commands share, or that say how a merge is spread out.

They are types: `threads: ThreadsOption = None` in a command's signature is the option `--threads`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resm_kernels.options import MAX_THREADS

RecipeArgument = Annotated[Path, typer.Argument(help="Recipe: a YAML file in mergekit's format.", show_default=False)]
MemoryOption = Annotated[
    str,
    typer.Option(
        "--memory-limit", help="Memory for tensor data in flight; exceeded only if the largest tensor needs more."
    ),
]
RestartOption = Annotated[bool, typer.Option("--restart", help="Begin anew instead of going on with unfinished work.")]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, max=MAX_THREADS, help="Threads to compute with.")
]
RandomSeedOption = Annotated[
    int, typer.Option("--random-seed", help="The seed of methods that draw random numbers (DARE, DELLA).")
]
MixedArchitecturesOption = Annotated[
    bool,
    typer.Option(
        "--allow-crimes/--no-allow-crimes", help="Merge models of different architectures if their tensors fit."
    ),
]
DeviceOption = Annotated[
    str, typer.Option(help="Where to compute: cpu; cuda, cuda:N, cuda:0,cuda:1, cuda:all; auto, a GPU if any.")
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Refuse models of which tensors would be left out, renamed or added.")
]
KeepOption = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Write the merge of each named document of RECIPE to DIR/NAME first. By default it is streamed.",
    ),
]
TiedEmbeddingsOption = Annotated[
    str,
    typer.Option(
        help="An adapter that changes one of two tied tensors, an embedding or its head: error; untie, store both; "
        "both, change both."
    ),
]


def _silence(context: typer.Context, value: bool) -> bool:
    """Switch off what this command shows of files that it fetches."""
    if value:
        from resm_kernels import hub

        context.with_resource(hub.silenced())
    return value


QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print neither progress nor the closing line.", callback=_silence)
]
SilentOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.", callback=_silence)]
OutFormatOption = Annotated[
    str, typer.Option(help="safetensors; or dcp, a folder for torch.distributed.checkpoint.load.")
]
EngineOption = Annotated[str, typer.Option(help="Who merges: local, this process; ray, workers of a Ray cluster.")]
AddressOption = Annotated[
    str | None,
    typer.Option(help="Address of a running Ray cluster, such as host:6379. Default: one that starts and ends here."),
]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Ray workers on each machine. Default: one, or one for each GPU.")
]
MachineOption = Annotated[
    str | None,
    typer.Option(
        metavar="measure|FILE",
        help="With --dry-run: estimate times for this machine, measured now, or for the rates in a JSON file.",
    ),
]
SpaceArgument = Annotated[
    Path, typer.Argument(help="Recipe with ranges in place of values (docs/search.md).", show_default=False)
]
EvaluateOption = Annotated[
    str,
    typer.Option("--evaluate", metavar="MODULE:FUNCTION", help="The function that judges a model.", show_default=False),
]
TrialsOption = Annotated[int | None, typer.Option(min=1, help="Trials of the search in all.")]
TimeOption = Annotated[str | None, typer.Option(help="Time to search now, such as 1h or 30min.")]
SamplerOption = Annotated[str, typer.Option(help="Who proposes trials: tpe; cmaes, for one objective; nsga2; random.")]
ObjectivesOption = Annotated[
    str | None, typer.Option(metavar="NAME,...", help="Scores to maximise. Default: all that FUNCTION returns.")
]
QuestionsOption = Annotated[int | None, typer.Option(min=1, help="Questions for each trial. Default: all.")]
PrefixOption = Annotated[
    int | None, typer.Option(min=1, help="Judge by so many questions first, and stop bad trials there.")
]
BestByOption = Annotated[str, typer.Option(help="Best trial: largest mean of the objectives, or largest worst.")]
ModelDtypeOption = Annotated[str, typer.Option("--dtype", help="Of the judged model: float32, bfloat16 or float16.")]
ModelDeviceOption = Annotated[str, typer.Option("--device", help="Where to merge and judge: cpu, cuda, cuda:N.")]
KeptMemoryOption = Annotated[
    str, typer.Option("--memory-limit", help="Memory for what is kept between merges; less is slower.")
]
