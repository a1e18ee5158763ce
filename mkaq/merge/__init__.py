"""MKA layer merging: similarity of layers, the merge plan, and its application."""
