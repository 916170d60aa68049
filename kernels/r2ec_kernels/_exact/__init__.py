"""What "exact" means here: canonical scores, their error bounds, excluded pairs, tables."""
