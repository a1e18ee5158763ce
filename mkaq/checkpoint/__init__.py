"""Checkpoints on disk: read, validated, written."""
