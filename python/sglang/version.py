"""The version of the distribution, which upstream's clients compare: at least 0.5.12, ours after the plus sign."""

__version__ = "0.5.12+lora.1"
