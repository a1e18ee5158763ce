"""Text sources, and the calibration tokens made from them."""
