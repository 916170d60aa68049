"""RecPO and contrastive training: the loop, one update, the item table, checkpoints, processes."""
