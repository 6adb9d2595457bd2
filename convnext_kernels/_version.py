"""The one place where the version is written; pyproject.toml and the compiled library take it from here."""

__version__ = "0.1.0"
