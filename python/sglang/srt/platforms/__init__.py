"""What the back needs to know about the machine it runs on; one module a device type, imported when it is chosen."""

from __future__ import annotations

from typing import Protocol

import torch

from sglang.srt.config.sections import DeviceSection
from sglang.srt.errors import ConfigError


class Platform(Protocol):
    """One device of this process."""

    device: torch.device

    def available_memory(self) -> int:
        """Bytes that weights and KV cache may still take."""
        ...


def get_platform(section: DeviceSection) -> Platform:
    """Set the device up for this process (threads, current device) and describe it.

    Raises:
        ConfigError: the device is not there.
    """
    if section.device == "cpu":
        from sglang.srt.platforms.cpu import CpuPlatform

        return CpuPlatform(section)
    if section.device == "cuda":
        from sglang.srt.platforms.cuda import CudaPlatform

        return CudaPlatform(section)
    raise ConfigError(f"--device {section.device} is not supported; choose cpu or cuda")


def allocate_weights(num_elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory for all weights of a model, in one piece."""
    if device.type == "cpu":
        from sglang.srt.platforms.cpu import allocate_huge

        return allocate_huge(num_elements, dtype)
    return torch.empty(num_elements, dtype=dtype, device=device)
