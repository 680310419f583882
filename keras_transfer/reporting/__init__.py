"""What people look at: charts, and tables of predictions.

Reading order: predictions, charts.
"""
