"""What differs between kinds of device outside of the operators: the torch device, its memory, threads."""

from __future__ import annotations

import psutil
import torch

from sglang.srt.config.sections import DeviceSection
from sglang.srt.errors import ConfigError


class CpuPlatform:
    """The host's processor."""

    def __init__(self, section: DeviceSection) -> None:
        self.device = torch.device("cpu")
        if section.threads is not None:
            torch.set_num_threads(section.threads)

    def available_memory(self) -> int:
        """Bytes that can be allocated without swapping."""
        return int(psutil.virtual_memory().available)


class CudaPlatform:
    """One NVIDIA (or, through torch's naming, AMD) GPU.

    Raises:
        ConfigError: torch sees no such device.
    """

    def __init__(self, section: DeviceSection) -> None:
        if not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch sees no GPU; use --device cpu, or install torch with CUDA")
        if section.gpu_id >= torch.cuda.device_count():
            raise ConfigError(f"--base-gpu-id {section.gpu_id}: torch sees {torch.cuda.device_count()} GPUs")
        self.device = torch.device("cuda", section.gpu_id)
        torch.cuda.set_device(self.device)

    def available_memory(self) -> int:
        """Free bytes of the device, torch's own cache included."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return int(free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device))


Platform = CpuPlatform | CudaPlatform


def get_platform(section: DeviceSection) -> Platform:
    """The platform of `section.device`."""
    return CudaPlatform(section) if section.device == "cuda" else CpuPlatform(section)
