"""Benchmarks: what the method gains (``utility``) and what it costs (``overhead``). README.md says how to run them."""
