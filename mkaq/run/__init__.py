"""A run on disk: the store of published stages, locks, resources, budgets."""
