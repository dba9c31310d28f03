"""The version of the distribution: that of upstream's server whose kernels these stand in for."""

__version__ = "0.5.12"
