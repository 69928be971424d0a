"""Ahead-of-time compilation of the Triton kernels, and what their machine code says; needs no GPU.

`python -m dudi_kernels.aot` compiles what the launchers would launch at published shapes, for GPUs
that need not be there, and reports registers, spills, shared memory, instructions by class, and a
bound on the use of the tensor cores (docs/kernels.md).
"""
