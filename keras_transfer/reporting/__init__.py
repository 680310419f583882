"""Charts for people to look at.

Reading order: charts.
"""
