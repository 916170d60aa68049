"""The RecPO loss."""
