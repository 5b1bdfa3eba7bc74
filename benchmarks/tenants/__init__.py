"""What several data owners on one machine cost: memory and time, by how they are put into processes."""
