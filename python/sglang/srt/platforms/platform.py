"""What differs between kinds of device outside of the operators: the torch device, its memory, threads."""

from __future__ import annotations

import ctypes
import mmap
import sys

import psutil
import torch

from sglang.srt.config.sections import DeviceSection
from sglang.srt.errors import ConfigError

_HUGE_PAGE = 2 << 20


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


def allocate_weights(num_elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory for all weights of a model in one piece; on a CPU advised to use huge pages."""
    tensor = torch.empty(num_elements, dtype=dtype, device=device)
    start = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    length = (tensor.data_ptr() + tensor.nbytes - start) // _HUGE_PAGE * _HUGE_PAGE
    if device.type == "cpu" and sys.platform == "linux" and length > 0:
        # Reading every weight once a step is bound by memory: fewer page walks make it 5-8 % faster. A kernel that
        # refuses the advice leaves small pages, which work too.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return tensor
