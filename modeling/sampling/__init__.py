"""From class labels to images: cached decoding, guidance, sampling codes, decoding them to bytes.

Not here: the model's teacher-forced forward pass (modeling/rear.py); files of samples (utils/files).
"""
