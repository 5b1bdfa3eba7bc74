"""Cells: one emulator, tuned for one task with one seed, computed one after the other, each kept as a JSON file."""
