"""What a study concludes: statistics over training seeds, table, figure, verdicts.

Not here: planning and running the cells (utils/studies).
"""
