"""A decoder taken apart: what is before its blocks, each block, and what follows them, each run on its own.

Only the weights of one part are in memory at a time, whatever the size of the model. transformers' own modules compute:
the model is built from its config without weights, and runs as a function of the weights that are passed to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resm_kernels.calibrate.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CACHED_CALLS = 8
"""The arguments of blocks are kept for so many shapes of hidden states: they hold masks, and are cheap to make."""

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer of a block, or the output head.

    Attributes:
        name: Path of the module within the model, such as "model.layers.0.self_attn.q_proj".
        transposed: True if the weight is stored as (in, out), as in GPT-2's Conv1D.
        has_bias: True if it adds a bias.
    """

    name: str
    transposed: bool
    has_bias: bool

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        return f"{self.name}.bias"


@dataclass(frozen=True)
class Call:
    """The arguments, beside the hidden states, with which the model calls one block."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class _Changed(Exception):
    """A block did not get what the recorder before it returned."""


class _Reached(BaseException):
    """Ends a forward pass at a module, from a hook; no error, and no `except Exception` of a model may swallow it."""


class _Recorder(nn.Module):
    """Stands for a block: keeps the arguments of its call, and passes on the hidden states, or those in `injected`."""

    def __init__(self, block: nn.Module, owner: Decoder, number: int) -> None:
        super().__init__()
        self.__dict__["_stands_for"] = block  # not a submodule: its weights are no weights of the frame
        self.__dict__["_owner"] = owner
        self._number = number

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stands_for"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_owner"]._record(self._number, hidden, Call(args, kwargs))


class Decoder:
    """The modules of one architecture, without weights.

    Args:
        config: transformers' configuration of a decoder with an output head.
        device: Where the weights will be; buffers, such as rotary frequencies, are put there.

    Raises:
        CalibrationError: The architecture has no list of blocks that can be run one by one.

    Attributes:
        prefixes: For each block the path of its module with a dot at the end, such as "model.layers.0.".
        names: The model's names.
        head: The output head; None if it is tied to the embedding.
    """

    def __init__(self, config: Any, device: torch.device | str = "cpu") -> None:
        model = without_weights(config)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(name, buffer.to(device), name not in module._non_persistent_buffers_set)
        self._frame: nn.Module = model.eval().requires_grad_(False)
        self.architecture = type(model).__name__
        if not is_causal(model):
            raise CalibrationError(
                f"{self.architecture}: is no decoder: its config.json says is_decoder: false, so that every position "
                "sees the later ones"
            )
        path, blocks = _block_list(model)
        self.names = model_names(model)
        self.prefixes = tuple(f"{path}.{i}." for i in range(len(blocks)))
        self._blocks: list[nn.Module] = list(blocks)
        self._record_tuple = _returns_tuple(self._blocks[0])
        self._calls: list[Call] = []
        self._entered: Tensor | None = None
        self._injected: Tensor | None = None
        for i, block in enumerate(self._blocks):
            blocks[i] = _Recorder(block, self, i)
        self._call_cache: dict[tuple[int, int], list[Call]] = {}
        name = self.names.head
        has_own_head = bool(name) and not self.names.tied
        self.head = LinearLayer(name, False, has_bias(model.get_submodule(name))) if has_own_head else None

    # ------------------------------------------------------------------ weights

    def block_parameters(self, number: int) -> dict[str, tuple[int, ...]]:
        """Full name → shape of every parameter of a block."""
        prefix = self.prefixes[number]
        return {prefix + name: tuple(p.shape) for name, p in self._blocks[number].named_parameters()}

    def outer_parameters(self) -> dict[str, tuple[int, ...]]:
        """Full name → shape of the parameters outside of the blocks; a tied head has the embedding's name alone."""
        return {name: tuple(p.shape) for name, p in self._frame.named_parameters()}

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Full name → shape of every parameter."""
        blocks = [self.block_parameters(i) for i in range(len(self.prefixes))]
        return {**self.outer_parameters(), **{name: shape for block in blocks for name, shape in block.items()}}

    # ------------------------------------------------------------------ running

    def enter(self, tokens: Tensor, outer: Weights) -> Tensor:
        """The hidden states with which the first block is called, (batch, length, width).

        Args:
            tokens: (batch, length) token ids.
            outer: The weights outside of the blocks.
        """
        self._run_frame({"input_ids": tokens}, outer)
        entered, calls = self._entered, self._calls
        assert entered is not None
        expected = self._calls_for(entered)
        if not _equal([(c.args, c.kwargs) for c in calls], [(c.args, c.kwargs) for c in expected]):
            raise CalibrationError(
                f"{self.architecture}: its blocks get more of the tokens than hidden states, so that they cannot be "
                "run one by one"
            )
        return entered

    def block(self, number: int, hidden: Tensor, weights: Weights) -> Tensor:
        """The hidden states behind a block."""
        call = self._calls_for(hidden)[number]
        prefix = self.prefixes[number]
        local = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        out = torch.func.functional_call(self._blocks[number], local, (hidden, *call.args), dict(call.kwargs))
        return out[0] if isinstance(out, tuple) else out

    def head_inputs(self, hidden: Tensor, outer: Weights) -> Tensor:
        """The output head's inputs, computed from the hidden states behind the last block (usually their norm)."""
        seen: list[Tensor] = []

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])
            raise _Reached

        handle = self._frame.get_submodule(self.names.head).register_forward_pre_hook(hook)
        self._injected = hidden
        try:
            self._run_frame({"inputs_embeds": self._no_embeddings(hidden)}, outer)
        finally:
            handle.remove()
            self._injected = None
        return seen[0]

    def linear_layers(self, number: int) -> dict[str, LinearLayer]:
        """The linear layers of a block, by the path of their modules within the block."""
        from transformers.pytorch_utils import Conv1D

        return {
            name: LinearLayer(self.prefixes[number] + name, isinstance(module, Conv1D), has_bias(module))
            for name, module in self._blocks[number].named_modules()
            if isinstance(module, (nn.Linear, Conv1D))
        }

    def stages(self, number: int, hidden: Tensor, weights: Weights) -> list[list[LinearLayer]]:
        """The block's linear layers in the order in which they run; those of one stage have the same input.

        Layers that do not see every position once and in order, as those of routed experts, are in no stage.
        """
        layers = self.linear_layers(number)
        calls: list[tuple[str, Tensor]] = []
        with self._hooked(number, layers, lambda name, x: calls.append((name, x))):
            self.block(number, hidden, weights)
        times = {name: sum(other == name for other, _ in calls) for name in layers}
        stages: list[tuple[Tensor, list[LinearLayer]]] = []
        for name, x in calls:
            if times[name] != 1 or x.numel() != hidden.shape[0] * hidden.shape[1] * x.shape[-1]:
                continue
            same = next((group for first, group in stages if _same_memory(first, x)), None)
            if same is None:
                stages.append((x, [layers[name]]))
            else:
                same.append(layers[name])
        return [group for _, group in stages]

    def stage_inputs(
        self, number: int, hidden: Tensor, weights: Weights, stages: Sequence[Sequence[LinearLayer]]
    ) -> list[Tensor]:
        """The input of each of the stages, each (batch, length, in). The pass ends at the last of them."""
        prefix = self.prefixes[number]
        firsts = [stage[0].name.removeprefix(prefix) for stage in stages]
        inputs: dict[str, Tensor] = {}

        def keep(name: str, x: Tensor) -> None:
            inputs[name] = x
            if len(inputs) == len(firsts):
                raise _Reached

        with self._hooked(number, firsts, keep), contextlib.suppress(_Reached):
            self.block(number, hidden, weights)
        return [_by_position(inputs[name], hidden) for name in firsts]

    def outputs_and_inputs(
        self, number: int, hidden: Tensor, weights: Weights, stages: Sequence[Sequence[LinearLayer]]
    ) -> tuple[Tensor, list[Tensor]]:
        """The hidden states behind a block, and the input of each of the stages, in one pass."""
        prefix = self.prefixes[number]
        firsts = [stage[0].name.removeprefix(prefix) for stage in stages]
        inputs: dict[str, Tensor] = {}
        with self._hooked(number, firsts, inputs.__setitem__):
            out = self.block(number, hidden, weights)
        return out, [_by_position(inputs[name], hidden) for name in firsts]

    # ------------------------------------------------------------------ inside

    @contextlib.contextmanager
    def _hooked(self, number: int, names: Any, keep: Callable[[str, Tensor], None]) -> Iterator[None]:
        handles = []
        for name in names:

            def hook(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                keep(name, args[0])

            handles.append(self._blocks[number].get_submodule(name).register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _calls_for(self, hidden: Tensor) -> list[Call]:
        """Each block's arguments for hidden states of this shape: they depend on nothing else.

        There is no padding on the left and no attention mask, so positions are 0, 1, … in every sequence.
        """
        shape = (hidden.shape[0], hidden.shape[1])
        calls = self._call_cache.get(shape)
        if calls is None:
            outer = {
                name: torch.zeros(1, dtype=hidden.dtype, device=hidden.device).expand(size)
                for name, size in self.outer_parameters().items()
            }
            self._run_frame({"inputs_embeds": self._no_embeddings(hidden)}, outer)
            calls = self._calls
            if len(self._call_cache) < _CACHED_CALLS:
                self._call_cache[shape] = calls
        return calls

    def _no_embeddings(self, hidden: Tensor) -> Tensor:
        """Zeros in place of looked-up tokens; OPT's embedding has another width than its hidden states."""
        return hidden.new_zeros(*hidden.shape[:2], self.outer_parameters()[self.names.embedding][-1])

    def _run_frame(self, inputs: dict[str, Tensor], outer: Weights) -> None:
        for attempt in range(2):
            self._calls, self._entered = [], None
            try:
                torch.func.functional_call(self._frame, dict(outer), (), {**inputs, "use_cache": False})
            except _Reached:
                return
            except (_Changed, TypeError, AttributeError) as error:
                if attempt:
                    raise CalibrationError(
                        f"{self.architecture}: computes with hidden states between its blocks, so that they cannot be "
                        "run one by one"
                    ) from error
                # The annotation may be wrong about what blocks return, and no arithmetic is done with a tuple.
                self._record_tuple = not self._record_tuple

    def _record(self, number: int, hidden: Tensor, call: Call) -> Any:
        if number == 0:
            self._entered = hidden
        elif hidden is not self._entered:
            raise _Changed
        self._calls.append(call)
        if number + 1 == len(self._blocks):
            if self._injected is None:
                raise _Reached
            hidden = self._injected
        return (hidden,) if self._record_tuple else hidden


def has_bias(module: nn.Module) -> bool:
    """Whether a linear layer has a bias."""
    return getattr(module, "bias", None) is not None


def _returns_tuple(block: nn.Module) -> bool:
    """Whether a block says that it returns a tuple; most blocks of transformers 5 return a tensor."""
    hint = str(getattr(type(block).forward, "__annotations__", {}).get("return", ""))
    return "tuple" in hint.lower()


def _by_position(x: Tensor, hidden: Tensor) -> Tensor:
    """(batch, length, in): some models flatten batch and length before a linear layer."""
    return x.reshape(hidden.shape[0], hidden.shape[1], x.shape[-1])


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


def _block_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The path and the list of the decoder's blocks."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and count > 0:
            return path, module
    raise CalibrationError(f"{type(model).__name__}: has no list of {count} blocks; need a decoder that has one")


def _equal(a: Any, b: Any) -> bool:
    """Whether two arguments are equal, by values where they are tensors or hold some."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b)


def is_causal(model: PreTrainedModel) -> bool:
    """Whether no position sees the later ones; False for encoders with a decoder's head but without `is_decoder`."""
    return getattr(model.config, "is_decoder", None) is not False or all(
        getattr(module, "is_causal", None) is not False for module in model.modules()
    )


@dataclass(frozen=True)
class ModelNames:
    """Names within an architecture.

    Attributes:
        base_prefix: The prefix of all tensors but the head's, such as "model."; some checkpoints leave it out.
        embedding: Name of the parameter that token ids look up.
        head: Path of the output head's module; empty if there is none.
        tied: Whether the head's weight is the embedding.
    """

    base_prefix: str
    embedding: str
    head: str
    tied: bool


def model_names(model: PreTrainedModel) -> ModelNames:
    """The names of a model of transformers."""
    modules = dict(model.named_modules())
    return ModelNames(
        base_prefix=f"{model.base_model_prefix}.",
        embedding=next(n for n, m in modules.items() if m is model.get_input_embeddings()) + ".weight",
        head=next((n for n, m in modules.items() if m is model.get_output_embeddings()), ""),
        tied=bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False)),
    )


def without_weights(config: Any) -> PreTrainedModel:
    """The modules of a decoder with an output head; the parameters, on the meta device, take no memory."""
    from transformers import AutoModelForCausalLM

    with _parameters_without_memory():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


@contextlib.contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Modules made within this context keep their buffers, but their parameters are on the meta device.

    Under ``torch.device("meta")`` buffers that no checkpoint stores, such as rotary frequencies, would be lost.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        # A parameter that is there already is tied to another module's, and has to stay the same object.
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
