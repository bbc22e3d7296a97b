"""The mixes: each is a page that returns a plan."""
