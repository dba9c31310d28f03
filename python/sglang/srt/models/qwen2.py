"""Qwen 2 and 2.5: biases on q, k and v."""

from sglang.srt.models.decoder import DecoderForCausalLM


class Qwen2ForCausalLM(DecoderForCausalLM):
    """See the module; the differences are in ModelConfig."""
