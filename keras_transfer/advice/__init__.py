"""Measured numbers -> advice, by rules of thumb whose thresholds have a source.

Reading order: logme, probe, ranking, rules.
"""
