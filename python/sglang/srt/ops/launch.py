"""How kernels are launched, for those who capture them."""

from sgl_kernel import programmatic_launch as programmatic_launch
