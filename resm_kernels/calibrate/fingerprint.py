"""Says which model a file of answers or of unfinished work was made from."""

from __future__ import annotations

import hashlib
import json

from resm_kernels.checkpoint import CheckpointError
from resm_kernels.checkpoint.auxiliary import CONFIG_FILE, MODEL_PATTERNS, TOKENIZER_PATTERNS, matching_files
from resm_kernels.engine.models import Model
from resm_kernels.files import read_bytes


def model_fingerprint(model: Model) -> str:
    """A digest of the weights' fingerprint, and of the content of config and tokenizer.

    `CheckpointReader.fingerprint` reads a part of each tensor: all would take as long as the work that is saved.
    """
    digest = hashlib.sha256(model.reader.fingerprint().encode())
    for folder in dict.fromkeys((model.base_folder, model.folder)):
        patterns = (CONFIG_FILE, "adapter_config.json", *MODEL_PATTERNS, *TOKENIZER_PATTERNS)
        for file in matching_files(folder, patterns):
            content = read_bytes(file, CheckpointError)
            digest.update(json.dumps([file.name, len(content)]).encode() + content)
    return digest.hexdigest()
