"""Images -> outputs of the frozen part of a model, computed once and cached.

Reading order: shards, index, file_index, cache, engine, parity, extraction,
frozen_part, base, copies, usable, image_table, activations.
"""
