"""How kernels are launched, for those who capture them and for kernels of our own that take part."""

from sgl_kernel import launches_early as launches_early
from sgl_kernel import programmatic_launch as programmatic_launch
