"""The run directory, whose files are written atomically.

Reading order: files, manifest, run.
"""
