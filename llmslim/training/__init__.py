"""Training: the losses, the loop (transformers' Trainer) and the step that methods which train build on."""
