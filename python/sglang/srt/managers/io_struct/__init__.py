"""Messages: `requests` is what clients send (upstream's public names), `wire` is what front and back exchange."""

from sglang.srt.managers.io_struct.requests import (
    AbortReq,
    CommitLoRAAdapterReqInput,
    ContinueGenerationReqInput,
    DestroyWeightsUpdateGroupReqInput,
    DropLoRAAdapterReqInput,
    FlushCacheReqInput,
    GenerateReqInput,
    InitWeightsUpdateGroupReqInput,
    LoadLoRAAdapterFromTensorsReqInput,
    LoadLoRAAdapterReqInput,
    LoRAUpdateOutput,
    PauseGenerationReqInput,
    StageLoRAAdapterReqInput,
    UnloadLoRAAdapterReqInput,
    WeightsUpdateGroupOutput,
)

__all__ = [
    "AbortReq",
    "CommitLoRAAdapterReqInput",
    "ContinueGenerationReqInput",
    "DestroyWeightsUpdateGroupReqInput",
    "DropLoRAAdapterReqInput",
    "FlushCacheReqInput",
    "GenerateReqInput",
    "InitWeightsUpdateGroupReqInput",
    "LoRAUpdateOutput",
    "LoadLoRAAdapterFromTensorsReqInput",
    "LoadLoRAAdapterReqInput",
    "PauseGenerationReqInput",
    "StageLoRAAdapterReqInput",
    "UnloadLoRAAdapterReqInput",
    "WeightsUpdateGroupOutput",
]
