"""Offsite tuning of large language models between a model owner and many data owners, on Ray."""

import logging

# Where DeepSpeed is installed, accelerate loads it with itself, and it writes warnings to stdout, which is for results.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)

__version__ = "0.1.0"
