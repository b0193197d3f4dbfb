"""Frozen image encoders: features that the model is trained towards, and that images are scored with.

Not here: what a tap does with them (modeling/targets/); metrics of features (evaluation/).
"""
