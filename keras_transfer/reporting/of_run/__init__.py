"""A run -> its report page, and the page of several runs.

Reading order: record, charts, gallery, page, compared.
"""
