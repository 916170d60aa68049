"""Log-probabilities of a linear head, without its logits."""
