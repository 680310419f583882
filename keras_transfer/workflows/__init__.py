"""One module per command, each readable like the method section of a paper.

Reading order: inputs, fit, judging, audit, report, evaluate, drift, predict, finetune,
gate, export, advise, rank, extract, leaderboard, compare, notebook.
"""
