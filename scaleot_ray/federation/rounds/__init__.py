"""What is kept of the rounds: registry, deltas, aggregates, and what an administrator does with them."""
