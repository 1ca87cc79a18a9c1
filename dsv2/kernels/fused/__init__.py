"""The kernels for an NVIDIA GPU, in Triton and torch's own fused calls.

Only dsv2/kernels/sets.py imports this package, and only on demand: Triton exists only on machines with a GPU.
"""
