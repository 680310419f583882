"""Training of a head on cached features, or of the tail of a network.

Reading order: labelled, losses, candidates, linear, mlp, head, out_of_fold, optim,
mixing, tail, tuned.
"""
