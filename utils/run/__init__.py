"""A training run: launch, checkpoints, resuming, stop signals, status, metrics.

Not here: what a step computes (scripts/train_rear.py); other files (utils/files).
"""
