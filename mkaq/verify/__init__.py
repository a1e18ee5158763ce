"""Verification of the claims of a manifest."""
