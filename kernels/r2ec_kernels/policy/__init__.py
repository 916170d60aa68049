"""What the update is: log-probabilities of a language-model head and the RecPO loss."""
