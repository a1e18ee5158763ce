"""Recovery of what merging lost, layer by layer."""
