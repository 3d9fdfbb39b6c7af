"""Share weights between blocks, as ALBERT does: what several blocks use is stored once, on disk and in memory.

Blocks go into groups, by their place or by what sharing would cost; the matrices of a group become one, fitted to
all of its blocks. Norms and biases stay each block's own, and so does its KV cache. --delta-rank gives every block a
small low-rank correction of its own. The model gets smaller, not faster: every block is computed as before.
"""
