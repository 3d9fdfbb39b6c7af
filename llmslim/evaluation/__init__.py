"""What a result is worth: perplexity, divergence from the base, speed and size, each by one measure for both."""
