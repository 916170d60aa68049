"""The one place of the version: of both distributions and both packages."""

__version__ = "0.1.0"
