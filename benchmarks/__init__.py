"""Benchmarks: what the method gains (``quality``) and what it costs (``overhead``). README.md says how to run them."""
