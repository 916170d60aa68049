"""Rank and log-probability of a target."""
