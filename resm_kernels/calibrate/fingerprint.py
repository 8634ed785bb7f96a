"""Says which model a file of answers, of statistics or of unfinished work was made from."""

from __future__ import annotations

import hashlib
import json
import os

from resm_kernels.checkpoint.auxiliary import CONFIG_FILE, MODEL_PATTERNS, TOKENIZER_PATTERNS
from resm_kernels.engine.models import Model
from resm_kernels.lora import AdapterReader


def model_fingerprint(model: Model) -> str:
    """A digest of a model's files: the content of config and tokenizer; header, size and last change of the weights.

    Weights are not read as a whole, which would take as long as the work that is saved.
    """
    digest = hashlib.sha256()
    readers = [model.reader, *([model.reader.base] if isinstance(model.reader, AdapterReader) else [])]
    for file in sorted({info.file for reader in readers for info in reader.tensors.values()}):
        with open(file, "rb") as stream:
            state = os.fstat(stream.fileno())
            header = stream.read(8)
            header += stream.read(int.from_bytes(header, "little"))
        digest.update(json.dumps([file.name, state.st_size, state.st_mtime_ns]).encode() + header)
    for folder in dict.fromkeys((model.base_folder, model.folder)):
        patterns = (CONFIG_FILE, "adapter_config.json", *MODEL_PATTERNS, *TOKENIZER_PATTERNS)
        for file in sorted({f for pattern in patterns for f in folder.glob(pattern) if f.is_file()}):
            digest.update(json.dumps([file.name, file.stat().st_size]).encode() + file.read_bytes())
    return digest.hexdigest()
