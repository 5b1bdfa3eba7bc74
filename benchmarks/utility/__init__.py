"""How much of a tuning reaches the full model: one builder setting, one task, one compute budget at a time."""
