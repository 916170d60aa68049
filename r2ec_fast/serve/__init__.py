"""A trained model as a recommender."""
