"""Predictions -> metrics, with confidence intervals; a run -> its model and images.

Reading order: names, metrics, intervals, crossvalidation, comparison, calibration,
validation, decisions, thresholds, out_of_distribution, drift, of_run, prediction.
"""
