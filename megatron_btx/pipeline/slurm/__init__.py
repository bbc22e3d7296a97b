"""Running the stages as Slurm jobs: scripts, submission, attempts and status."""
