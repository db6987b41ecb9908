"""Triton kernels, one module per operation, installed as `fastmmkd.kernels`. None so far: the references run."""
