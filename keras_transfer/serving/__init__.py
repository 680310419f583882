"""A model -> what other programs serve, verified on real images.

Reading order: signatures, sample, warmup, savedmodel, formats, server.
"""
