"""Products of matrices, compiled by LLVM for the processor that a worker finds itself on."""
