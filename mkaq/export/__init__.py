"""The same model in the formats of other runtimes: one module per format."""
