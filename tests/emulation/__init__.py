"""The CUDA kernels compiled for the CPU; see cuda.h."""
