"""Files that are complete or not there: atomic writing, work in parts, npz, weights, the Hub.

Not here: a run's own files (utils/run), codes and images on disk (data/).
"""
