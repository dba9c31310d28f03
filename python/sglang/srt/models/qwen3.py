"""Qwen 3: q and k are normalised per head before they are rotated."""

from sglang.srt.models.decoder import DecoderForCausalLM


class Qwen3ForCausalLM(DecoderForCausalLM):
    """See the module; the differences are in ModelConfig."""
