"""The operations that take the time, one a file, each as plain torch and, beside it, fused for a GPU.

A model is built with one `KernelSet`: `REFERENCE` runs anywhere and defines what is computed; the set
of dsv2/kernels/fused.py computes the same on an NVIDIA GPU in bf16.
"""
