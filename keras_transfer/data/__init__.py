"""DATA, in whatever form its owner has it -> images, their splits and their pixels.

Reading order: reading, folders, tables, listing, splitting, loading, decode, augment,
samples.
"""
