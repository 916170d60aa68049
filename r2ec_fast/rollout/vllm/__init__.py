"""Rollouts sampled by vLLM, inside this process or on a server."""
