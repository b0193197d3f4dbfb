"""Studies: a plan of arms and seeds, its cells, and running them side by side.

Not here: statistics and verdicts (evaluation/studies).
"""
