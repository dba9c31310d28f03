"""Operations of the server as Triton kernels; imports triton, so ask for a module by name."""
