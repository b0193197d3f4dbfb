"""What the projections of taps should point at: for each code of an image, a vector.

Not here: which hidden states are read and how the terms are weighted (modeling/taps.py, modeling/robust_embedding.py).
"""
