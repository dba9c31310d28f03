"""Makes the base model of the recipe `tiny-cpu`: 0.6 million parameters that add two-digit numbers, badly.

    python benchmark/rl/make_tiny_base.py python/sglang/rl/recipes/tiny-base

A Qwen3 of four layers over characters, taught "17+25=42" where most answers are wrong. It ends up knowing the sum (the
likeliest answer is nearly always right) without being sure of it (a sampled one is right one time in three): what
reinforcement learning is good at repairing. Takes about five minutes on two idle cores. The result is committed, so
that nobody has to; the same seed gives the same model up to the order of additions.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import torch
from torch import Tensor

CHARACTERS = "0123456789+-*=()abcdefghijklmnopqrstuvwxyz ?.,:\n"
SPECIAL = ("<pad>", "<eos>", "<bos>")
VOCAB = 64
PAD, EOS, BOS = 0, 1, 2
WIDTH = 12
"""Tokens of the longest problem with its answer."""
WRONG = 0.6
"""Share of answers that are wrong."""
BATCH, STEPS, WARMUP, RATE = 256, 1100, 100, 2e-3


def vocabulary() -> dict[str, int]:
    """Token -> id; what is left of VOCAB is reserved."""
    tokens = [*SPECIAL, *CHARACTERS]
    return {token: i for i, token in enumerate([*tokens, *(f"<r{i}>" for i in range(len(tokens), VOCAB))])}


def save_tokenizer(out: Path) -> None:
    """A tokenizer of single characters, in transformers' format."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    ).save_pretrained(out)


def wrong(total: int, rng: random.Random) -> int:
    """An answer near the right one."""
    return max(0, total + rng.choice([-10, -2, -1, 1, 2, 10, rng.randint(-30, 30)]))


def batch(rng: random.Random) -> tuple[Tensor, Tensor]:
    """(tokens, labels), int64 [BATCH, WIDTH]; labels are -100 before the answer and after its end."""
    ids, labels = [], []
    known = vocabulary()
    for _ in range(BATCH):
        a, b = rng.randint(0, 99), rng.randint(0, 99)
        total = wrong(a + b, rng) if rng.random() < WRONG else a + b
        problem = [known[c] for c in f"{a}+{b}="]
        answer = [*(known[c] for c in str(total)), EOS]
        row = problem + answer
        ids.append(row + [PAD] * (WIDTH - len(row)))
        labels.append([-100] * len(problem) + answer + [-100] * (WIDTH - len(row)))
    return torch.tensor(ids), torch.tensor(labels)


def main() -> None:
    """Train and save."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, betas=(0.9, 0.95))
    started = time.time()
    for step in range(args.steps):
        rate = RATE * min(1.0, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, labels = batch(rng)
        loss = model(input_ids=ids, attention_mask=(ids != PAD).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            print(f"step {step + 1} of {args.steps}: loss {loss.item():.3f}, {time.time() - started:.0f} s", flush=True)
    # Half the size; it is read back as float32.
    model.bfloat16().save_pretrained(args.out)
    save_tokenizer(args.out)


if __name__ == "__main__":
    main()
