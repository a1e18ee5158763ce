"""Recovery of quality lost by merging, layer by layer."""
