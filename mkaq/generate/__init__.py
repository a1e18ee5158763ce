"""Text from a whole model in memory, token by token."""
