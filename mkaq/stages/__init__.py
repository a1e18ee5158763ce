"""The stages of a run, one file each: what the recipe asks, what is recorded, and what is done."""
