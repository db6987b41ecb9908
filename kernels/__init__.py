"""Triton kernels, a module per operation, with the functions that the operation declares (`Op.functions`)."""
