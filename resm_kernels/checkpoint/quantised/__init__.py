"""Quantised weights: how models store them, and how they are formed in fp32, a module for each family of formats.

Every format is a subclass of `Encoding`, and a function that finds the weights of that format among the tensors of a
checkpoint. `QuantisedReader` puts them together.
"""

from __future__ import annotations

from resm_kernels.checkpoint.quantised.encoding import Encoding
from resm_kernels.checkpoint.quantised.reader import QuantisedReader, formed, is_quantised, without_quantization

__all__ = ["Encoding", "QuantisedReader", "formed", "is_quantised", "without_quantization"]
