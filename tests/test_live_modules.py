"""Merges into modules whose tensors share memory, or that are wrapped by others; and that all of it is restored."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import HIDDEN, Family, load_model, save_model
from test_live import Loose, same, values
from torch import Tensor, nn

from resm_kernels import merge_checkpoints
from resm_kernels.engine import MergeError
from resm_kernels.live import LiveModels
from resm_kernels.live.memory import check_memory

pytestmark = pytest.mark.usefixtures("one_thread")

LAYER = "model.layers.0.self_attn"
QKV = tuple(f"{LAYER}.{name}_proj.weight" for name in ("q", "k", "v"))


def set_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    setattr(module.get_submodule(owner), last, nn.Parameter(tensor, requires_grad=False))


def merged_file(family: Family, method: str = "ties") -> dict[str, Tensor]:
    merge_checkpoints(family.recipe(method), family.root / f"merged-{method}")
    return load_model(family.root / f"merged-{method}")


def test_views_of_one_buffer_that_have_nothing_in_common_are_merged(family: Family) -> None:
    """Rows of one matrix, columns of another, and a transposed parameter."""
    module = Loose(family.base)
    rows, columns = torch.zeros(3 * HIDDEN, HIDDEN), torch.zeros(HIDDEN, 3 * HIDDEN)
    for i, name in enumerate(QKV):
        set_parameter(module, name, rows[i * HIDDEN : (i + 1) * HIDDEN])
        set_parameter(module, name.replace("layers.0", "layers.1"), columns[:, i * HIDDEN : (i + 1) * HIDDEN])
    set_parameter(module, f"{LAYER}.o_proj.weight", torch.zeros(HIDDEN, HIDDEN).T)
    expected = merged_file(family)
    with LiveModels() as models:
        models.merge_into(module, family.recipe("ties"))
    assert same(module, expected)
    assert torch.equal(rows, torch.cat([expected[name].float() for name in QKV]))
    assert torch.equal(columns, torch.cat([expected[n.replace("layers.0", "layers.1")].float() for n in QKV], 1))


def _sliced(module: nn.Module, q: str, k: str) -> None:
    memory = torch.zeros(HIDDEN + 1, HIDDEN)
    set_parameter(module, q, memory[:-1])
    set_parameter(module, k, memory[1:])


def _transposed(module: nn.Module, q: str, k: str) -> None:
    memory = torch.zeros(HIDDEN, HIDDEN)
    set_parameter(module, q, memory)
    set_parameter(module, k, memory.T)


def _columns(module: nn.Module, q: str, k: str) -> None:
    memory = torch.zeros(HIDDEN, HIDDEN + 8)
    set_parameter(module, q, memory[:, :HIDDEN])
    set_parameter(module, k, memory[:, 8:])


def _other_dtype(module: nn.Module, q: str, k: str) -> None:
    memory = torch.zeros(HIDDEN, HIDDEN)
    set_parameter(module, q, memory)
    set_parameter(module, k, memory.view(torch.bfloat16)[:, :HIDDEN])


@pytest.mark.parametrize("share", [_sliced, _transposed, _columns, _other_dtype])
def test_parameters_that_overlap_partly_are_refused(family: Family, share: Callable[..., None]) -> None:
    module = Loose(family.base)
    share(module, QKV[0], QKV[1])
    before = values(module)
    with LiveModels() as models:
        for call in (models.merge_into, lambda *arguments: models.merged(*arguments).__enter__()):
            with pytest.raises(MergeError, match=r"'model.layers.0.self_attn.[qk]_proj.weight' and .* different views"):
                call(module, family.recipe("ties"))
    assert same(module, before)


def test_a_tensor_with_several_elements_in_one_place_is_refused(family: Family) -> None:
    module = Loose(family.base)
    set_parameter(module, "model.norm.weight", torch.zeros(1).expand(HIDDEN))
    with LiveModels() as models, pytest.raises(MergeError, match=r"elements of the tensor 'model.norm.weight' lie in"):
        models.merge_into(module, family.recipe("ties"))
    memory = torch.zeros(200)
    check_memory({"apart": memory.as_strided((3, 4), (3, 10)), "after": memory[40:]})
    check_memory({"apart": memory.as_strided((2, 3), (3, 2))})  # places 0, 2, 4 and 3, 5, 7
    with pytest.raises(MergeError, match="elements of the tensor 'close' lie in one place"):
        check_memory({"close": memory.as_strided((3, 3), (2, 1))})
    long, short = memory[:100].as_strided((10,), (10,)), memory[50:51]
    with pytest.raises(MergeError, match="'long' and 'short' are different views"):
        check_memory({"short": short, "between": memory[5:6], "long": long})


def test_equal_views_are_one_parameter(family: Family) -> None:
    """They are other objects, of the same memory, as from `torch.nn.Parameter(tied.data)`."""
    for folder in (family.base_folder, *family.folders):
        weights = load_model(folder)
        save_model(folder, weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    module = Loose(family.base)
    set_parameter(module, "lm_head.weight", module.get_parameter("model.embed_tokens.weight").detach())
    with LiveModels() as models:
        models.merge_into(module, family.recipe("ties"))
    assert same(module, merged_file(family))


def test_all_is_restored_whatever_happens_within(family: Family) -> None:
    """NaN payloads, parameters that are not contiguous, buffers, tied ones, and a change of the dtype meanwhile."""
    for folder in (family.base_folder, *family.folders):
        weights = load_model(folder)
        save_model(folder, weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    module: Any = Loose(family.base, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(module.named_parameters()):
        drawn = torch.randint(-(2**15), 2**15, parameter.shape, generator=generator, dtype=torch.int16)
        set_parameter(module, name, drawn.view(torch.bfloat16))
    module.lm_head.weight = module.model.embed_tokens.weight
    square = module.get_parameter(QKV[0]).detach()
    set_parameter(module, QKV[0], torch.cat([square, square], 1)[:, ::2])
    norm = module.model.norm.weight.detach()
    del module.model.norm.weight
    module.model.norm.register_buffer("weight", norm)
    bits = {n: t.clone().view(torch.int16) for n, t in module.state_dict().items()}
    memory = {n: (t.data_ptr(), t.stride()) for n, t in module.state_dict().items()}

    def check() -> None:
        assert all(torch.equal(t.view(torch.int16), bits[n]) for n, t in module.state_dict().items())
        assert all((t.data_ptr(), t.stride()) == memory[n] for n, t in module.state_dict().items())
        assert module.lm_head.weight is module.model.embed_tokens.weight

    with LiveModels() as models:
        with models.merged(module, family.recipe("ties")):
            assert same(module, merged_file(family))
        check()
        with models.merged(module, family.recipe("ties")):
            for parameter in module.parameters():
                parameter.data = parameter.data.half()  # as module.half() does, which gives buffers other memory
            module.get_parameter("lm_head.weight").data.zero_()
        check()
        with pytest.raises(KeyboardInterrupt), models.merged(module, family.recipe("ties")):
            raise KeyboardInterrupt
        check()


def test_wrapped_modules_are_seen_through(family: Family) -> None:
    expected = merged_file(family)
    recipe = family.recipe("ties")
    with LiveModels() as models:
        wrappers: list[Callable[[nn.Module], Any]] = [torch.compile, nn.DataParallel]
        wrappers.append(lambda m: nn.DataParallel(wrappers[0](nn.DataParallel(m))))
        for wrap in wrappers:
            module = Loose(family.base)
            models.merge_into(wrap(module), recipe)
            assert same(module, expected)
        module = Loose(family.base)
        inner = module.model.layers
        setattr(inner, "0", torch.compile(inner.get_submodule("0")))
        assert any("_orig_mod" in name for name in module.state_dict())
        with models.merged(module, recipe):
            assert {n.replace("_orig_mod.", "") for n in module.state_dict()} == expected.keys()
            assert all(torch.equal(t, expected[n.replace("_orig_mod.", "")]) for n, t in module.state_dict().items())
        assert not any(p.any() for p in module.parameters())


def test_a_module_of_distributed_data_parallel(family: Family, tmp_path: Path) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this build of torch has no gloo")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        module = Loose(family.base)
        with LiveModels() as models:
            models.merge_into(nn.parallel.DistributedDataParallel(module), family.recipe("ties"))
    finally:
        torch.distributed.destroy_process_group()
    assert same(module, merged_file(family))


def test_adapters_of_peft_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft makes the adapters")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
    from experts import save_expert

    folder = save_expert(tmp_path / "base", "Llama", 0)
    recipe = {"merge_method": "linear", "models": [{"model": str(folder), "parameters": {"weight": 1}}]}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    before = values(model)
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    with LiveModels() as models:
        for module in (wrapped, wrapped.get_base_model()):
            with pytest.raises(MergeError, match=r"module: has adapters of peft .*q_proj.base_layer.*need the model"):
                models.merge_into(module, recipe)
        plain: Any = wrapped.unload()
        models.merge_into(plain, recipe)
    assert same(plain, before)


def test_tensors_that_only_look_plain_are_refused(family: Family) -> None:
    class Shard(Tensor):
        """As a distributed or quantised tensor is: of a float dtype, but without all of its elements."""

    module = Loose(family.base)
    set_parameter(module, "model.norm.weight", torch.zeros(HIDDEN).as_subclass(Shard))
    with LiveModels() as models, pytest.raises(MergeError, match=r"'model.norm.weight' is a Shard, need a plain"):
        models.merge_into(module, family.recipe("ties"))
