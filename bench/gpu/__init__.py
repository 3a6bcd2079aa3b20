"""What a machine with a CUDA device is checked and timed with; see flexidepth.bench.gpu_check."""
