"""The contract of every method that computes norms and inner products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from inputs import FLOATS, call_of, group, same_bits
from oracles import assert_near
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resm_kernels import NonFiniteError, merge
from resm_kernels.methods import get


class LargestAllocation(TorchDispatchMode):
    """While this mode is on, `largest` is the size in bytes of the largest tensor that an op makes."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.largest = 0
        self._known = {t.untyped_storage().data_ptr() for t in inputs}

    def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return outputs


class NormContract:
    """Tests that a module runs for its method by declaring a subclass.

    Attributes:
        method: The name of the method.
        parameters: Parameters of every merge; the contract adds those that have no default.
        workspace_per_element: Bytes that the method may allocate for each element of a tensor, besides the result.
    """

    method: str
    parameters: ClassVar[dict[str, Any]] = {}
    workspace_per_element = 0

    def merged(self, base: Tensor | None, experts: Sequence[Tensor], **keywords: Any) -> Tensor:
        return merge(base, experts, self.method, **(call_of(self.method)[1] | self.parameters | keywords))

    def bases(self, base: Tensor) -> list[Tensor | None]:
        return [base] if get(self.method).needs_base else [base, None]

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_is_rounded_once(self, dtype: torch.dtype) -> None:
        n_experts = call_of(self.method)[0]
        base, experts = group((40, 30), n_experts, base_dtype=torch.float32, expert_dtypes=[dtype, torch.bfloat16])
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for origin in self.bases(base):
            exact = self.merged(None if origin is None else base.to(wide), [e.to(wide) for e in experts])
            assert exact.dtype == wide
            assert same_bits(self.merged(origin, experts, out_dtype=wide), exact)
            assert same_bits(self.merged(origin, experts, out_dtype=torch.float32), exact.float())
            if wide == torch.float32:
                assert same_bits(self.merged(origin, experts, out_dtype=torch.bfloat16), exact.bfloat16())

    def test_result_has_the_bases_dtype(self) -> None:
        base, experts = group((9,), call_of(self.method)[0], base_dtype=torch.bfloat16, expert_dtypes=[torch.float32])
        for origin in self.bases(base):
            assert self.merged(origin, experts).dtype == (torch.float32 if origin is None else torch.bfloat16)

    def test_same_bits_for_threads_and_instruction_sets(self, every_way: Callable[[], Iterator[str]]) -> None:
        base, experts = group((300, 301), call_of(self.method)[0], base_dtype=torch.bfloat16)
        expected = [self.merged(origin, experts) for origin in self.bases(base)]
        for way in every_way():
            merges = [self.merged(origin, experts) for origin in self.bases(base)]
            assert all(same_bits(a, b) for a, b in zip(merges, expected, strict=True)), way

    def test_allocates_no_more_than_its_workspace(self) -> None:
        base, experts = group((900, 901), call_of(self.method)[0], base_dtype=torch.float32)
        for origin in self.bases(base):
            with LargestAllocation([base, *experts]) as allocation:
                result = self.merged(origin, experts, out_dtype=torch.bfloat16)
            assert allocation.largest <= max(result.nbytes, self.workspace_per_element * base.numel())

    def test_views_are_merged_as_their_copies(self) -> None:
        base, experts = group((33, 21), call_of(self.method)[0])
        expected = self.merged(base.mT.contiguous(), [e.mT.contiguous() for e in experts])
        assert same_bits(self.merged(base.mT, [e.mT for e in experts]), expected)

    def test_values_that_are_not_finite_are_refused_by_name(self) -> None:
        method = get(self.method)
        base, experts = group((20, 10), call_of(self.method)[0])
        names = [f"experts[{i}]" for i in range(len(experts))]
        inputs = dict(zip(names, experts, strict=True))
        if method.needs_base or method.optional_base:
            inputs["base"] = base
        for name, tensor in inputs.items():
            for bad in (float("nan"), float("-inf")):
                finite = tensor[3, 4].clone()
                tensor[3, 4] = bad
                with pytest.raises(NonFiniteError) as caught:
                    self.merged(base, experts)
                assert (caught.value.argument, caught.value.count) == (name, 1)
                assert caught.value.index == (None if name == "base" else names.index(name))
                tensor[3, 4] = finite

    def test_zeros_and_equal_tensors(self) -> None:
        base, experts = group((6, 5), call_of(self.method)[0])
        nothing = [torch.zeros_like(e) for e in experts]
        assert not self.merged(torch.zeros_like(base), nothing).any()
        same = self.merged(base, [base.clone() for _ in experts])
        torch.testing.assert_close(same, base, rtol=3e-7, atol=0)


class ScaleFreeContract(NormContract):
    """The contract of methods that, with the parameters `scale_free`, scale with their inputs."""

    scale_free: ClassVar[dict[str, Any]] = {}

    def test_twice_the_inputs_give_twice_the_result(self) -> None:
        base, experts = group((30, 20), call_of(self.method)[0])
        for origin in self.bases(base):
            expected = 2 * self.merged(origin, experts, **self.scale_free)
            twice = None if origin is None else 2 * origin
            assert same_bits(self.merged(twice, [2 * e for e in experts], **self.scale_free), expected)


class SymmetricContract(ScaleFreeContract):
    """The contract of methods that scale with their inputs and ignore the order of the experts."""

    def test_order_of_the_experts(self) -> None:
        base, experts = group((30, 20), 4)
        for origin in self.bases(base):
            reordered = self.merged(origin, [experts[t] for t in (2, 0, 3, 1)])
            assert_near(reordered, self.merged(origin, experts), [base, *experts], 4 * 2.0**-24)
