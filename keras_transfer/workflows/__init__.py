"""One file for each command, which reads like the method section of a paper.

Reading order: inputs, fit, evaluate, predict, finetune, export, advise, rank.
"""
