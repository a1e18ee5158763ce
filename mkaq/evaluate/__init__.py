"""Perplexity, and the tasks of lm-evaluation-harness."""
