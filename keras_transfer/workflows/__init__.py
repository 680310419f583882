"""One module per command, each readable like the method section of a paper.

Reading order: inputs, fit, judging, evaluate, drift, predict, finetune, gate, export,
advise, rank.
"""
