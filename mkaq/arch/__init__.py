"""Model families: the names and roles of a model's modules, what a configuration says of its layers."""
