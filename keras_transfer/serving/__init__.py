"""Exports of a model for other programs, verified on real images.

Reading order: signatures, sample, warmup, savedmodel, formats, server.
"""
