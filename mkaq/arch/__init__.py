"""Model families: the names and roles of modules, and what a model configuration says about layers."""
