"""Decoding that computes and stores the prompt of G samples once."""
