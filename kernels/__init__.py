"""Triton kernels, a module per operation, with the functions that `fastmmkd.ops.library*` declares."""
