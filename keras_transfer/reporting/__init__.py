"""What people look at.

Reading order: charts.
"""
