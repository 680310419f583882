"""Images -> what the frozen part of a model says of them, computed once.

Reading order: shards, index, cache, engine, parity, extraction, base, usable,
activations.
"""
