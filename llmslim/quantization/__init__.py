"""Weight quantization: the grid, bit packing, the packed Linear, and one file per method."""
