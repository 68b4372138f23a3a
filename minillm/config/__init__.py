"""What a run is told: typed sections, and recipes in YAML."""
