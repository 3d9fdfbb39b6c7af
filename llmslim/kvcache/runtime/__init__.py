"""What runs: the cache of a layer and of a model, and the attention that reads it. Imports transformers."""
