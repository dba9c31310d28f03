"""Two-layer random models of every family, made by transformers, and the schedules parity is checked under."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from engine.model_harness import Harness
from torch import Tensor

from sglang.srt.config.model_config import load_model_config
from sglang.srt.config.sections import LoadSection
from sglang.srt.model_loader.loader import load_model

VOCAB = 160
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "llama-rope3": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN_ROPE}),
    "mistral": ("Mistral", {"sliding_window": 9, "head_dim": 32}),
    "mistral-full": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 48, "num_key_value_heads": 1}),
}
SCHEDULES = ["one-shot", "chunked", "prefix", "decode", "mixed", "uneven"]


def save_family(name: str, path: Path, **save_options: Any) -> Any:
    """Make the model, write it to `path`, return transformers' copy in eval mode."""
    import transformers

    family, changes = FAMILIES[name]
    torch.manual_seed(sum(map(ord, name)))
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **changes})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Weights large enough that a wrong one shows; norms away from 1.
            parameter.normal_(1.0 if "norm" in parameter_name else 0.0, 0.2)
    model.save_pretrained(path, **save_options)
    return model


def load_ours(
    path: Path, page_size: int = 1, device: str = "cpu", dtype: torch.dtype = torch.float32, capacity: int = 1024
) -> Harness:
    """Our model of a saved directory, in a harness."""
    config = load_model_config(str(path))
    target = torch.device(device)
    name = str(dtype).removeprefix("torch.")
    model = load_model(config, LoadSection(path=str(path), dtype=name), target)
    return Harness(model, config, page_size=page_size, device=target, dtype=dtype, capacity=capacity)


@torch.inference_mode()
def reference_logits(model: Any, ids: list[int]) -> Tensor:
    """transformers' logits of every position, [len(ids), V], float32 on the CPU."""
    tokens = torch.tensor([ids], device=model.device)
    return model(tokens, use_cache=False).logits[0].float().cpu()


def prompts(lengths: tuple[int, ...] = (37, 21, 3, 30)) -> list[list[int]]:
    """Random token lists."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]


def run_schedule(harness: Harness, schedule: str, ids: list[list[int]]) -> list[Tensor]:
    """Logits of every position of every list, computed the way `schedule` names."""
    return {
        "one-shot": _one_shot,
        "chunked": _chunked,
        "prefix": _prefix,
        "decode": _decode,
        "mixed": _mixed,
        "uneven": _uneven,
    }[schedule](harness, ids)


def _one_shot(harness: Harness, ids: list[list[int]]) -> list[Tensor]:
    return harness.step(*[(harness.open(), tokens) for tokens in ids])


def _chunked(harness: Harness, ids: list[list[int]]) -> list[Tensor]:
    result = []
    for tokens in ids:
        sequence = harness.open()
        result.append(torch.cat([harness.step((sequence, tokens[i : i + 7]))[0] for i in range(0, len(tokens), 7)]))
    return result


def _prefix(harness: Harness, ids: list[list[int]]) -> list[Tensor]:
    """Each list is computed once, then again from its first 16 tokens, in the same step for all that are longer."""
    parents = [harness.open() for _ in ids]
    first = harness.step(*zip(parents, ids, strict=True))
    again = [(harness.fork(p, 16), t[16:]) if len(t) > 17 else None for p, t in zip(parents, ids, strict=True)]
    second = iter(harness.step(*[work for work in again if work]))
    return [torch.cat([f[:16], next(second)]) if work else f for f, work in zip(first, again, strict=True)]


def _decode(harness: Harness, ids: list[list[int]]) -> list[Tensor]:
    """Two tokens of prompt, then one at a time, all sequences together; they end at different steps."""
    sequences = [harness.open() for _ in ids]
    parts = [[logits] for logits in harness.step(*[(s, t[:2]) for s, t in zip(sequences, ids, strict=True)])]
    for position in range(2, max(map(len, ids))):
        live = [i for i, tokens in enumerate(ids) if len(tokens) > position]
        for i, logits in zip(live, harness.step(*[(sequences[i], [ids[i][position]]) for i in live]), strict=True):
            parts[i].append(logits)
    return [torch.cat(part) for part in parts]


def _mixed(harness: Harness, ids: list[list[int]]) -> list[Tensor]:
    """In every step some sequences add one token and others several; who adds how many goes round."""
    sequences = [harness.open() for _ in ids]
    parts: list[list[Tensor]] = [[] for _ in ids]
    done, turn = [0] * len(ids), 0
    while any(done[i] < len(ids[i]) for i in range(len(ids))):
        live = [i for i in range(len(ids)) if done[i] < len(ids[i])]
        counts = [(1, 5, 1, 2, 9)[(i + turn) % 5] for i in live]
        work = [(sequences[i], ids[i][done[i] : done[i] + n]) for i, n in zip(live, counts, strict=True)]
        for i, (_, new), logits in zip(live, work, harness.step(*work), strict=True):
            parts[i].append(logits)
            done[i] += len(new)
        turn += 1
    return [torch.cat(part) for part in parts]


def _uneven(harness: Harness, ids: list[list[int]]) -> list[Tensor]:
    """Decode of sequences whose lengths differ a lot: each starts where its length says."""
    sequences = [harness.open() for _ in ids]
    parts = []
    for sequence, tokens in zip(sequences, ids, strict=True):
        parts.append(harness.step((sequence, tokens[:-1]))[0])
    last = harness.step(*[(s, t[-1:]) for s, t in zip(sequences, ids, strict=True)])
    return [torch.cat([a, b]) for a, b in zip(parts, last, strict=True)]
