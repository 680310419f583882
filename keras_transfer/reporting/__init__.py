"""What people look at: pages, charts, heat and feature maps, and tables of predictions.

Reading order: predictions, charts, explain, projection, text_chart; page, contents,
album, thumbnails, summary, of_run; tracking, display.
"""
