"""How fast and how large a model is in each runtime that is installed."""
