"""The paper's mixes, each a page that returns a plan."""
