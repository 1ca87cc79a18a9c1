"""The kernels for an NVIDIA GPU, in Triton and torch's own fused calls.

Only dsv2/kernels/sets.py imports this package, inside a function: without a GPU, Triton is not installed.
"""
