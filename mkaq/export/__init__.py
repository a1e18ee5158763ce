"""The artifact that the user ships, its manifest and its model card."""
