"""Pretrained bases, their weights, and the classifiers built from them.

Reading order: bases, efficientnet_lite, alexnet, torch_checkpoint, weights, classifier,
flip, fold, layer_groups.
"""
