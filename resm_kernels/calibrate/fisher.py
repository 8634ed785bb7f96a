"""The diagonal of a model's Fisher information on samples, by one backward pass for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from resm_kernels.calibrate.errors import CalibrationError
from resm_kernels.calibrate.prompts import Sample
from resm_kernels.methods import tensor_key

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fisher_information(
    model: PreTrainedModel,
    parameters: Mapping[str, Tensor],
    samples: Sequence[Sample],
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """F = (1/n)·Σ_i (∂ log p(y_i | x_i)/∂θ)² of each parameter θ, over the n samples.

    x_i is a prompt with its answer, and y_i has a token for every position of the answer, drawn from what the model
    predicts there. Gradients of different positions have the mean 0 and do not depend on each other, given x_i, so that
    the mean of F over seeds is Σ_p Σ_y p(y)·(∂ log p(y)/∂θ)² over positions p, averaged over samples.

    Args:
        model: A decoder with an output head.
        parameters: The parameters of the model by any names; gradients are recorded for them from now on.
        samples: Prompts with answers, at least one.
        seed: A whole number; sample i's tokens depend on it and on i alone.
        progress: `progress(samples done, all)`.

    Returns:
        F by name, fp32, of each parameter's shape; 0 for parameters that the model did not use.

    Raises:
        CalibrationError: The model gives NaN or infinite logits.

    Memory: a gradient and a sum of squares for every weight, and the activations of one sample.
    """
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    sums = {name: torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for name, p in parameters.items()}
    for i, sample in enumerate(samples):
        generator = torch.Generator().manual_seed(tensor_key(seed, f"sample {i}"))
        gradients = torch.autograd.grad(
            _log_likelihood(model, sample, generator), list(parameters.values()), allow_unused=True
        )
        for total, gradient in zip(sums.values(), gradients, strict=True):
            if gradient is not None:
                total.addcmul_(gradient.float(), gradient.float(), value=1 / len(samples))
        if progress is not None:
            progress(i + 1, len(samples))
    return sums


def _log_likelihood(model: PreTrainedModel, sample: Sample, generator: torch.Generator) -> Tensor:
    """log p(y | x) for tokens y that are drawn at the positions of the answer."""
    tokens = torch.tensor([sample.tokens[:-1]], device=model.device)
    with torch.enable_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[0, sample.answer_start - 1 :].float()
        if not bool(torch.isfinite(logits).all()):
            raise CalibrationError("statistics: the model gives NaN or infinite logits; it is damaged")
        drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).to(logits.device)
        return logits.log_softmax(-1).gather(1, drawn).sum()
