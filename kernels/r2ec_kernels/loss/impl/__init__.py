"""The terms of the RecPO loss, and their reference."""
