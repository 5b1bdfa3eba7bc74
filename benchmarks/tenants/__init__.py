"""What several data owners cost: packed into a process, in whole runs, when aggregated, when a process dies."""
