"""Messages: `requests` is what clients send (upstream's public names), `wire` is what front and back exchange."""

from sglang.srt.managers.io_struct.requests import (
    AbortReq,
    ContinueGenerationReqInput,
    FlushCacheReqInput,
    GenerateReqInput,
    LoadLoRAAdapterFromTensorsReqInput,
    LoadLoRAAdapterReqInput,
    LoRAUpdateOutput,
    PauseGenerationReqInput,
    UnloadLoRAAdapterReqInput,
)

__all__ = [
    "AbortReq",
    "ContinueGenerationReqInput",
    "FlushCacheReqInput",
    "GenerateReqInput",
    "LoRAUpdateOutput",
    "LoadLoRAAdapterFromTensorsReqInput",
    "LoadLoRAAdapterReqInput",
    "PauseGenerationReqInput",
    "UnloadLoRAAdapterReqInput",
]
