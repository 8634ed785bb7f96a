"""Which device a merge computes on."""

from __future__ import annotations

import torch


def device_of(name: str | torch.device) -> torch.device:
    """The device by that name: "cpu", "cuda", "cuda:N", or "auto", the first GPU that torch sees, else the CPU.

    Raises:
        ValueError: Another name, or a GPU that torch does not see.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {str(name)!r}, need auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        seen = f"{count} GPU{'s' if count > 1 else ''}" if count else "no GPU"
        raise ValueError(f"device: got {str(name)!r}, but torch sees {seen} here; need cpu, auto or one that it sees")
    return device
