"""Running the stages on this machine: its processes, progress and clean-up."""
