"""Measurements -> advice, by rules of thumb with documented thresholds.

Reading order: logme, probe, ranking, rules.
"""
