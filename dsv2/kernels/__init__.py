"""The costly operations, one per file. Each exists in plain torch and fused for a GPU.

A model is built with one `KernelSet`. The set `reference` runs anywhere and defines the results. The fused
sets compute the same on an NVIDIA GPU in bf16.
"""
