"""What a result is worth: perplexity, divergence from the base, speed and size."""
