"""Predictions -> figures, with intervals; a finished run -> its model and its images.

Reading order: metrics, comparison, crossvalidation, of_run, prediction.
"""
