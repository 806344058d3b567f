"""What was asked: parameters, jobs, datasets, plans, the chunk grammar. Values in, values out."""
