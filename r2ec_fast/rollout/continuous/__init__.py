"""Decoding of rows that come and go: a new one joins between two steps, a finished one leaves."""
