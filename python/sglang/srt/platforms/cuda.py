"""The CUDA platform: one GPU of this process."""

from __future__ import annotations

import torch

from sglang.srt.config.sections import DeviceSection
from sglang.srt.errors import ConfigError


class CudaPlatform:
    """GPU `gpu_id`, made current."""

    def __init__(self, section: DeviceSection) -> None:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if section.gpu_id >= count:
            raise ConfigError(
                f"GPU {section.gpu_id} does not exist: torch sees {count}; use --device cpu or another id"
            )
        self.device = torch.device("cuda", section.gpu_id)
        torch.cuda.set_device(self.device)

    def available_memory(self) -> int:
        """Bytes free on the device, with what torch's allocator holds but does not use."""
        free, _ = torch.cuda.mem_get_info(self.device)
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(free + held)
