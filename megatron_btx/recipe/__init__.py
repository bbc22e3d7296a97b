"""What a run is: one YAML file, read, checked and planned without torch."""
