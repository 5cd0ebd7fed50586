"""Command lines of the benchmarks, one module each; `main(arguments)` returns the exit code."""
