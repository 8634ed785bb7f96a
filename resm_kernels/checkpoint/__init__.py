"""Reads and writes model folders: the weights in safetensors files, and the small files that belong to them.

A checkpoint is a folder with `config.json` and either `model.safetensors` or shards with an index. No tensor
stays in this package: the reader fills buffers of the caller, and the writer writes each tensor to a shard at once.
"""

from __future__ import annotations

from resm_kernels.checkpoint.auxiliary import Auxiliary, json_bytes, read_chat_template, read_config
from resm_kernels.checkpoint.format import CheckpointError, TensorInfo, format_bytes, parse_size
from resm_kernels.checkpoint.forms import Form, open_form
from resm_kernels.checkpoint.reader import CheckpointReader
from resm_kernels.checkpoint.spelling import RespelledReader
from resm_kernels.checkpoint.writer import CheckpointWriter, OutputPlan, check_output_folder, plan_output

__all__ = [
    "Auxiliary",
    "CheckpointError",
    "CheckpointReader",
    "CheckpointWriter",
    "Form",
    "OutputPlan",
    "RespelledReader",
    "TensorInfo",
    "check_output_folder",
    "format_bytes",
    "json_bytes",
    "open_form",
    "parse_size",
    "plan_output",
    "read_chat_template",
    "read_config",
]
