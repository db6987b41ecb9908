"""What tests and benchmarks share: cases of every operation, how exact they have to be, calls at the configs' sizes.

It needs pytest; nothing else in the package imports it.
"""
