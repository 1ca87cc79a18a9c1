"""The operations of dsv2/kernels for an NVIDIA GPU, in Triton and torch's own fused calls.

Nothing imports this package but `dsv2.kernels.sets`, as Triton is not everywhere.
"""
