"""The import law as data: which module stands on which level, on which side, and what it may import.

Used by the tests of the law (`unit/test_import_law.py`) and of what the front loads (`unit/test_import_time.py`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sglang

PACKAGE = Path(sglang.__file__).parent

SHARED, FRONT, BACK, TRAINER = "shared", "front", "back", "trainer"

FRONT_MANAGERS = (
    "adapter_calls",
    "adapter_service",
    "adapter_staging",
    "control_client",
    "detokenizer",
    "group_calls",
    "outbox",
    "pause_control",
    "request_builder",
    "request_lifecycle",
    "request_state",
    "response",
    "rid_index",
    "step_output",
    "stop_matcher",
    "tokenizer_manager",
)
BACK_MANAGERS = (
    "admission",
    "batch",
    "group_control",
    "invariants",
    "lora_control",
    "output_processor",
    "planner",
    "request",
    "scheduler",
    "scheduler_control",
    "scheduler_process",
    "stats",
    "tp_worker",
)

# The half of lora that the front uses; nothing of it imports torch.
SHARED_LORA = (
    "adapter",
    "adapter_config",
    "adapter_fit",
    "adapter_image",
    "adapter_reader",
    "adapter_slab",
    "adapter_source",
    "host_buffer",
    "lease",
    "lora_registry",
    "problems",
    "safetensors_bytes",
    "slots",
    "target_modules",
    "tensor_unpickler",
)

# Longest prefix wins. The back half of level 2 has an order of its own, behind the point.
LEVELS: dict[str, tuple[float, str]] = {
    "sglang.version": (0, SHARED),
    "sglang.srt.utils": (0, SHARED),
    "sglang.srt.constants": (0, SHARED),
    "sglang.srt.errors": (0, SHARED),
    "sglang.srt.environ": (0, SHARED),
    "sglang.srt.sampling.sampling_params": (1, SHARED),
    "sglang.srt.managers.io_struct": (1, SHARED),
    "sglang.srt.managers.ipc": (1, SHARED),
    "sglang.srt.server_args": (1, SHARED),
    "sglang.srt.config": (1, SHARED),
    **{f"sglang.srt.managers.{name}": (2, FRONT) for name in FRONT_MANAGERS},
    "sglang.srt.function_call": (2, FRONT),
    "sglang.srt.parser": (2, FRONT),
    "sglang.srt.observability": (2, FRONT),
    "sglang.srt.platforms": (2.0, BACK),
    # What a step hands to models and attention stands below both.
    "sglang.srt.model_executor.forward_context": (2.15, BACK),
    "sglang.srt.ops": (2.1, BACK),
    # How slabs travel: the one operator-less module, which trainers and the front read.
    "sglang.srt.ops.slab_image": (1, SHARED),
    "sglang.srt.distributed": (2.2, BACK),
    "sglang.srt.layers": (2.3, BACK),
    "sglang.srt.sampling": (2.3, BACK),
    # Clients import it; it stands beside the layers because it needs nothing but torch.
    "sglang.srt.weight_sync": (2.3, BACK),
    **{f"sglang.srt.lora.{name}": (1, SHARED) for name in SHARED_LORA},
    "sglang.srt.lora": (2.4, BACK),
    "sglang.srt.models": (2.5, BACK),
    "sglang.srt.model_loader": (2.6, BACK),
    "sglang.srt.mem_cache": (2.7, BACK),
    "sglang.srt.model_executor": (2.8, BACK),
    **{f"sglang.srt.managers.{name}": (3, BACK) for name in BACK_MANAGERS},
    "sglang.srt.entrypoints": (4, FRONT),
    "sglang.launch_server": (5, FRONT),
    "sglang.cli": (5, FRONT),
    "sglang.benchmark": (5, FRONT),
    "sglang.bench_serving": (5, FRONT),
    "sglang.rl": (6, TRAINER),
    "sglang": (5, FRONT),
}

# Empty package files, which importing a submodule runs: they stand below everything.
NAMESPACES = ("sglang.srt", "sglang.srt.lora", "sglang.srt.managers", "sglang.srt.ops", "sglang.srt.sampling")

# Third-party packages only some modules may import, wherever in the file the import stands.
ONLY: dict[str, tuple[str, ...]] = {
    # What trains needs torch; what publishes imports it only for torch's tensors.
    "torch": (BACK, "sglang.rl"),
    "triton": ("sglang.srt.ops",),
    "flashinfer": ("sglang.srt.ops",),
    # The half without torch is for trainers, too.
    "sgl_kernel": ("sglang.srt.ops", "sglang.rl"),
    "zmq": ("sglang.srt.managers.ipc",),
    "fastapi": ("sglang.srt.entrypoints",),
    "starlette": ("sglang.srt.entrypoints",),
    "uvicorn": ("sglang.srt.entrypoints",),
    "transformers": ("sglang.rl",),
    "peft": ("sglang.rl",),
}


@dataclass(frozen=True)
class Import:
    """One import of one module.

    Attributes:
        target: dotted name.
        typing_only: it stands under TYPE_CHECKING.
        lazy: it stands inside a function.
    """

    importer: str
    target: str
    line: int
    typing_only: bool = False
    lazy: bool = False


def modules() -> dict[str, Path]:
    """Dotted name → file of every module of the package."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("sglang", *path.relative_to(PACKAGE).with_suffix("").parts)
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def place(module: str) -> tuple[float, str] | None:
    """(level, side) of a module of ours; None when the law does not know it."""
    if module in NAMESPACES:
        return 0, SHARED
    prefix = module
    while prefix not in LEVELS:
        prefix = prefix.rpartition(".")[0]
    # The root package is no prefix for the rest: a new package must be given its own line.
    return None if prefix == "sglang" and module != "sglang" else LEVELS[prefix]


def imports_of(module: str, path: Path, known: dict[str, Path]) -> list[Import]:
    """Every import of a file, those inside functions and by literal name through importlib included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    nodes = list(ast.walk(tree))
    branches = [n for n in nodes if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    typing_only = {id(inner) for branch in branches for n in branch.body for inner in ast.walk(n)}
    functions = [n for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lazy = {id(inner) for function in functions for inner in ast.walk(function)}
    return [
        Import(module, target, node.lineno, typing_only=id(node) in typing_only, lazy=id(node) in lazy)
        for node in nodes
        for target in _targets(node, package, known)
    ]


def _targets(node: ast.AST, package: str, known: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*parents, base] if base else parents)
        # `from package import submodule` imports the submodule.
        yield from {f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names}
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
        yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))
