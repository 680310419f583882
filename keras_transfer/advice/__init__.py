"""Measurements -> advice, by rules of thumb with documented thresholds.

Reading order: evidence, logme, probe, ranking, costs, trial, rules.
"""
