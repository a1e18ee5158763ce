"""MKA: diffusion maps, layer similarity, the merge plan and its application."""
