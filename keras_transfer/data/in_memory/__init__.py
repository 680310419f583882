"""Images that are given in Python -> a listing.

Reading order: forms, arrays, pixels, class_labels, datasets, spool, path_tables.

A wrong type, dtype, shape, length or range of pixels is a `UsageError`; a wrong label
or weight of an image is a `KerasTransferError`, as in a table.
"""
