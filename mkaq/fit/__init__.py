"""Least squares toward the original hidden states, for merging, recovery and quantization."""
