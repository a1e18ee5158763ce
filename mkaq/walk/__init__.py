"""The walk: a forward pass with one decoder layer in memory at a time."""
