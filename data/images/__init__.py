"""Pictures on disk: tar shards and folders per class, reading, cropping and packing them, the embedded ones.

Not here: float images to bytes and grids of pictures (utils/images.py), images in an npz (utils/files/npz.py).
"""
