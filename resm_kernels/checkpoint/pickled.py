"""PyTorch's pickled checkpoints (`pytorch_model.bin`): which tensors a file holds, and where. Their code is not run."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from resm_kernels.checkpoint.format import CheckpointError, TensorInfo
from resm_kernels.dtypes import SAFETENSORS_NAMES, dtype_name
from resm_kernels.files import check_regular, first_line

PICKLED_FILE: Final = "pytorch_model.bin"
PICKLED_SUFFIX: Final = ".bin"
PICKLED_INDEX: Final = "pytorch_model.bin.index.json"


def read_pickled(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a file that `torch.save` wrote, in the order of their offsets.

    The file is unpickled by torch's restricted unpickler (`weights_only=True`), which runs no code of the file, and
    without reading the tensors. Several names may stand for the same bytes.

    Raises:
        CheckpointError: The file is missing or damaged, is no dictionary of tensors, or would run code.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    check_regular(file, CheckpointError, "download the model again")
    try:
        is_archive = zipfile.is_zipfile(file)
        if is_archive:
            with zipfile.ZipFile(file) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("its entries are compressed")
            with FakeTensorMode():  # tensors without data, whose storages know their offset in the file
                content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), "it is damaged")
        raise CheckpointError(
            f"{file}: is not read, because unpickling it could run code or is not possible ({reason.strip()}); need a "
            "file of tensors alone, as torch.save(model.state_dict()) writes it, or better safetensors"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{file}: cannot be read as a file of torch.save ({first_line(error)})") from error
    if not is_archive:
        raise CheckpointError(
            f"{file}: is damaged, or in the format of torch before 1.6, whose tensors cannot be read one by one; save "
            "it again: torch.save(torch.load(file, weights_only=True), file)"
        )
    if not isinstance(content, Mapping) or not all(isinstance(t, torch.Tensor) for t in content.values()):
        raise CheckpointError(f"{file}: need a dictionary of tensors, as torch.save(model.state_dict()) writes it")
    tensors = [_tensor_info(file, str(name), tensor) for name, tensor in content.items()]
    return {t.name: t for t in sorted(tensors, key=lambda t: (t.offset, t.name))}


def _tensor_info(file: Path, name: str, tensor: torch.Tensor) -> TensorInfo:
    if tensor.dtype not in SAFETENSORS_NAMES:
        raise CheckpointError(
            f"{file}: tensor {name!r} has the unsupported dtype {dtype_name(tensor.dtype)}; need one of "
            f"{', '.join(map(dtype_name, SAFETENSORS_NAMES))}"
        )
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None or not tensor.is_contiguous():
        raise CheckpointError(
            f"{file}: tensor {name!r} is not stored in the order of its elements; save it again with .contiguous()"
        )
    nbytes = tensor.numel() * tensor.dtype.itemsize
    offset = start + tensor.storage_offset() * tensor.dtype.itemsize
    if offset + nbytes > file.stat().st_size:
        raise CheckpointError(f"{file}: tensor {name!r} ends behind the end of the file; download it again")
    return TensorInfo(name, tensor.dtype, tuple(tensor.shape), file, offset, nbytes)
