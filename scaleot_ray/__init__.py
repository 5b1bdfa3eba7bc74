"""Offsite tuning of large language models between a model owner and many data owners, on Ray."""

__version__ = "0.1.0"
