"""One module per command, each readable like the method section of a paper.

Reading order: inputs, fit, evaluate, predict, finetune, export, advise, rank.
"""
