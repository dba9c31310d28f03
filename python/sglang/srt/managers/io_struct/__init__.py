"""Messages: `requests` is what clients send (upstream's public names), `wire` is what front and back exchange."""

from sglang.srt.managers.io_struct.requests import (
    AbortReq,
    CommitLoRAAdapterReqInput,
    ContinueGenerationReqInput,
    DropLoRAAdapterReqInput,
    FlushCacheReqInput,
    GenerateReqInput,
    LoadLoRAAdapterFromTensorsReqInput,
    LoadLoRAAdapterReqInput,
    LoRAUpdateOutput,
    PauseGenerationReqInput,
    StageLoRAAdapterReqInput,
    UnloadLoRAAdapterReqInput,
)

__all__ = [
    "AbortReq",
    "CommitLoRAAdapterReqInput",
    "ContinueGenerationReqInput",
    "DropLoRAAdapterReqInput",
    "FlushCacheReqInput",
    "GenerateReqInput",
    "LoRAUpdateOutput",
    "LoadLoRAAdapterFromTensorsReqInput",
    "LoadLoRAAdapterReqInput",
    "PauseGenerationReqInput",
    "StageLoRAAdapterReqInput",
    "UnloadLoRAAdapterReqInput",
]
