"""`lora_section`: what the adapter flags mean. Part of `config.resolve`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from sglang.srt.config.sections import MAX_LORA_RANK, LoRASection
from sglang.srt.errors import ConfigError
from sglang.srt.server_args import ServerArgs

Preload = tuple[str, str, bool]

ALL_MODULES = ("all", "all-linear")
_POLICIES = ("lru", "fifo")


def lora_section(args: ServerArgs) -> LoRASection:
    """The section of these flags; --lora-paths alone switches adapters on.

    Raises:
        ConfigError: a value out of range, a bad --lora-paths item, or more pinned adapters than may be.
    """
    preload = _preload(args.lora_paths)
    if not (args.enable_lora or (args.enable_lora is None and preload)):
        if preload:
            raise ConfigError("--lora-paths needs --enable-lora")
        return LoRASection()
    for flag, value, low in (
        ("--max-loras-per-batch", args.max_loras_per_batch, 1),
        ("--max-loaded-loras", args.max_loaded_loras, 1),
        ("--max-lora-rank", args.max_lora_rank, 1),
        ("--lora-keep-last", args.lora_keep_last, 1),
    ):
        if value is not None and value < low:
            raise ConfigError(f"{flag} {value} must be at least {low}")
    max_lora_rank = _largest_rank(preload, args.lora_root) if args.max_lora_rank is None else args.max_lora_rank
    if max_lora_rank > MAX_LORA_RANK:
        raise ConfigError(f"--max-lora-rank {max_lora_rank} must be at most {MAX_LORA_RANK}")
    if args.lora_eviction_policy not in _POLICIES:
        raise ConfigError(f"--lora-eviction-policy {args.lora_eviction_policy} must be one of {', '.join(_POLICIES)}")
    _check_preload(preload, args)
    return LoRASection(
        enabled=True,
        max_loras_per_batch=args.max_loras_per_batch,
        max_loaded_loras=args.max_loaded_loras,
        max_lora_rank=max_lora_rank,
        target_modules=_target_modules(args.lora_target_modules),
        eviction_policy=cast(Any, args.lora_eviction_policy),
        keep_last=args.lora_keep_last,
        root=args.lora_root or None,
        strict=bool(args.lora_strict_loading),
        require_adapter=args.require_adapter,
        preload=preload,
    )


def _preload(value: Any) -> tuple[Preload, ...]:
    """--lora-paths in every form: {name: path}, or a list of PATH, NAME=PATH and {lora_name, lora_path, pinned}."""
    if not value:
        return ()
    if isinstance(value, Mapping):
        return tuple((str(name), str(path), False) for name, path in value.items())
    return tuple(_preload_item(item) for item in value)


def _preload_item(item: Any) -> Preload:
    if isinstance(item, str):
        name, found, path = item.partition("=")
        return (name, path, False) if found else (item, item, False)
    if not isinstance(item, Mapping):
        item = vars(item)  # upstream's LoRARef
    name, path = item.get("lora_name"), item.get("lora_path")
    if not name or not path:
        raise ConfigError(f"--lora-paths {dict(item)} needs lora_name and lora_path")
    return str(name), str(path), bool(item.get("pinned"))


def _largest_rank(preload: tuple[Preload, ...], root: str | None) -> int:
    """The largest rank of these adapters, upstream's default too: slots with room for more would be wasted on them.

    What cannot be told decides nothing here; loading the adapter says what is wrong with it.
    """
    ranks: list[Any] = []
    for _, path, _ in preload:
        try:
            config = json.loads(Path(root or "", path, "adapter_config.json").read_text())
            ranks += [config["r"], *(config.get("rank_pattern") or {}).values()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return MAX_LORA_RANK
    told = bool(ranks) and all(type(rank) is int and 1 <= rank <= MAX_LORA_RANK for rank in ranks)
    return max(ranks) if told else MAX_LORA_RANK


def _check_preload(preload: tuple[Preload, ...], args: ServerArgs) -> None:
    names = [name for name, _, _ in preload]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"--lora-paths names {', '.join(twice)} more than once")
    if args.max_loaded_loras is not None and len(names) > args.max_loaded_loras:
        raise ConfigError(f"--lora-paths has {len(names)} adapters, --max-loaded-loras is {args.max_loaded_loras}")


def _target_modules(value: Any) -> tuple[str, ...] | None:
    names = [value] if isinstance(value, str) else list(value or [])
    if not names or any(name in ALL_MODULES for name in names):
        return None
    return tuple(names)
