"""Files: atomic writing, chunk files, npz, weights, the Hub.

Not here: a run's own files (utils/run), codes and images on disk (data/).
"""
