"""The graph of stages: where each runs, what is done, what is left."""
