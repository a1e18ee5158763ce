"""Perplexity, and the verification of every claim of a manifest."""
