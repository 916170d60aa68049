"""A run that was told to end."""


class RunStopped(RuntimeError):
    """SIGTERM ended a run, which has saved what it needs to go on; the message says how."""
