"""What a run leaves: read, write, load and verify checkpoints; one file per format."""
