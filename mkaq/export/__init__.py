"""The artifact in other formats: one module per format, with `NAME`, `refusal`, `write` and `check`."""
