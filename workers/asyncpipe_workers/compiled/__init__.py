"""Kernels that LLVM compiles for the processor that a worker finds itself on."""
