"""A run on disk: published stages, locks and memory estimates."""
