"""Factorize Linears: two narrow matrices in the place of one.

A matrix [out, in] becomes u [out, rank] times v [rank, in] wherever the two have fewer weights than the one. The
result is smaller on disk and in memory, and takes fewer operations per token; its factors can be quantized
afterwards like any other Linear. --embeddings-rank does the same to the table of token embeddings and its head.
"""
