"""Verification of every claim of a manifest."""
