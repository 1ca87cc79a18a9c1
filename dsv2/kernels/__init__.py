"""The operations that take the time, one a file, each as plain torch and, beside it, fused for a GPU.

A model is built with one `KernelSet`: `REFERENCE` runs anywhere and defines what is computed; the set
of dsv2/kernels/fused computes the same on an NVIDIA GPU in bf16.
"""

HEAD_CHUNK = 16384  # tokens whose logits the fused head makes at once: 3.1 GiB at a vocabulary of 102400
