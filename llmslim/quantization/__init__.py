"""Quantize the weights of a model to 2 to 8 bits.

Every Linear of the blocks is put on a grid of few bits with a scale per group of inputs, packed, saved, verified
in a fresh process and measured against the base. Routers and norms are never touched; embeddings and head are
when --embeddings-bits says so (in small models they are a third of the bytes).
"""
