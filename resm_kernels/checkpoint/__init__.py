"""Reads and writes model folders: the weights in safetensors files, and the small files that belong to them.

A checkpoint is a folder with `config.json` and either `model.safetensors` or shards with an index, or a folder that
`torch.distributed.checkpoint` has written (`DcpReader`). No tensor stays in this package: the reader fills buffers of
the caller, and the writer writes each tensor to a shard at once.
"""

from __future__ import annotations

from resm_kernels.checkpoint.auxiliary import Auxiliary, json_bytes, read_chat_template, read_config
from resm_kernels.checkpoint.dcp import DcpReader, is_dcp_folder
from resm_kernels.checkpoint.dcp_writer import plan_dcp_output
from resm_kernels.checkpoint.format import CheckpointError, CheckpointWarning, TensorInfo, format_bytes, parse_size
from resm_kernels.checkpoint.forms import Form, open_form
from resm_kernels.checkpoint.output_plan import OutputPlan, plan_output
from resm_kernels.checkpoint.place import check_output_folder, unfinished_folder
from resm_kernels.checkpoint.reader import CheckpointReader
from resm_kernels.checkpoint.rearranged import RearrangedReader
from resm_kernels.checkpoint.spelling import RespelledReader
from resm_kernels.checkpoint.tensor_writer import TensorWriter
from resm_kernels.checkpoint.verify import VerifyReport, verify_checkpoint
from resm_kernels.checkpoint.writer import CheckpointWriter

__all__ = [
    "Auxiliary",
    "CheckpointError",
    "CheckpointReader",
    "CheckpointWarning",
    "CheckpointWriter",
    "DcpReader",
    "Form",
    "OutputPlan",
    "RearrangedReader",
    "RespelledReader",
    "TensorInfo",
    "TensorWriter",
    "VerifyReport",
    "check_output_folder",
    "format_bytes",
    "is_dcp_folder",
    "json_bytes",
    "open_form",
    "parse_size",
    "plan_dcp_output",
    "plan_output",
    "read_chat_template",
    "read_config",
    "unfinished_folder",
    "verify_checkpoint",
]
