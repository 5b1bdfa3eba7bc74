"""What a run needs and what there is: nodes, memory, data, the connected Ray and its processes."""
