"""Checkpoints on disk, model families, the walk over layers, and the shard writer."""
