"""DATA in any supported form -> images, their splits and their pixels.

Reading order: reading, tables, listing, then a module for each form of DATA (folders
and class_folders; cells, text_cells, arrow_cells, columns and table_files; packaged;
in_memory/), grouping, splitting and loading; decode with formats/, quality, augment,
samples, sorting.
"""
