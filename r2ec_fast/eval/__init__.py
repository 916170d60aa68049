"""Full-catalog ranking, its metrics, counting baselines, and paired comparisons."""
