"""Models larger than memory: what a streamed build takes."""
