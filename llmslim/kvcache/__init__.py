"""Quantized KV caches: how they are stored (codec, layer, cache) and the attention that reads them packed.

with llmslim.kv_cache(model, bits=4):
    model.generate(...)
"""
