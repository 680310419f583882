"""Training of a head on cached features, or of the tail of a network.

Reading order: head, optim, tail.
"""
