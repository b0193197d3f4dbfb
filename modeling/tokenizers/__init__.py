"""Frozen image tokenizers, images to codes and back, and the networks that train one.

Not here: the generator on their codes (modeling/rear.py); decoding for speed (modeling/sampling/image_sampler.py).
"""
