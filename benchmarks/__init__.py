"""What UNO costs over plain flow matching, and what the kernels do: python -m benchmarks --help."""
