"""The command line: every parser, and nothing that other rooms need."""
