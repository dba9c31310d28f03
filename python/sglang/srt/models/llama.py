"""Llama 1 to 3.3, and models of the same shape (SmolLM2)."""

from sglang.srt.models.decoder import DecoderForCausalLM


class LlamaForCausalLM(DecoderForCausalLM):
    """See the module; the differences are in ModelConfig."""
