"""What is trained: a head on cached features, or the tail of a network.

Reading order: head, optim, tail.
"""
