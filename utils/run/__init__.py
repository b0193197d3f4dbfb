"""The life of one training run: launch, where it starts, checkpoints, stop signals, status, metrics.

Not here: what a step computes (scripts/train_rear.py); files that are no part of a run (utils/files).
"""
