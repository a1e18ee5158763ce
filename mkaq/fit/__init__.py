"""Least squares toward the original hidden states: what merging, recovery and quantization share."""
