"""Recovery by distillation: the whole model learns what the source predicts."""
