"""The run directory: its files are there whole or not at all, and it is found again.

Reading order: files, manifest, run.
"""
