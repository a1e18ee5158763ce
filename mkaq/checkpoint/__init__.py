"""Checkpoints on disk: reading, validation, writing."""
