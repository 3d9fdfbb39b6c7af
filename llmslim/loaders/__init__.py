"""What a run reads: models and texts, by name, from the Hub, the disk, or the Python that runs it."""
