"""Predictions -> metrics, with confidence intervals; a run -> its model and images.

Reading order: metrics, comparison, crossvalidation, of_run, prediction.
"""
