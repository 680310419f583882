"""DATA in any supported form -> images, their splits and their pixels.

Reading order: reading, folders, tables, listing, splitting, loading, decode, quality,
augment, samples, sorting.
"""
