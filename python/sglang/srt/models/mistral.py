"""Mistral: optionally attends to a sliding window."""

from sglang.srt.models.decoder import DecoderForCausalLM


class MistralForCausalLM(DecoderForCausalLM):
    """See the module; the differences are in ModelConfig."""
