"""Model folders on disk: safetensors in, safetensors out, and the small files around them.

A checkpoint is a folder with `config.json` and either `model.safetensors` or shards with an index. Nothing here holds
more than one tensor: the reader reads into buffers the caller owns, the writer writes each tensor where it belongs.
"""

from __future__ import annotations

from resm_kernels.checkpoint.auxiliary import Auxiliary, json_bytes, read_chat_template, read_config
from resm_kernels.checkpoint.format import CheckpointError, TensorInfo, format_bytes, parse_size
from resm_kernels.checkpoint.reader import CheckpointReader
from resm_kernels.checkpoint.writer import CheckpointWriter, OutputPlan, check_output_folder, plan_output

__all__ = [
    "Auxiliary",
    "CheckpointError",
    "CheckpointReader",
    "CheckpointWriter",
    "OutputPlan",
    "TensorInfo",
    "check_output_folder",
    "format_bytes",
    "json_bytes",
    "parse_size",
    "plan_output",
    "read_chat_template",
    "read_config",
]
