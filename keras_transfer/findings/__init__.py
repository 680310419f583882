"""Image table, features and predictions -> findings of an audit.

Reading order: finding, images; neighbors, registration, duplicates; odd_files,
label_errors, outliers, classes; telling, properties, exif, wording, shortcuts; probing,
borders, sources; groups, cleaned.
"""
