"""The quick start: a generated world, a small model made from nothing, every stage of training."""
