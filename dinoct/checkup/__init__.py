"""Before a long run: what this machine has, what a run will take, and the batch that fits."""
