"""The service over HTTP: FastAPI, server-sent events, Prometheus."""
