"""Text sources and the calibration tokens that are made of them."""
