"""The walk over layers: one decoder layer in memory at a time."""
