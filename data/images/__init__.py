"""Images on disk: reading tar shards and folders, decoding and cropping, writing shards, the quick start's tiles."""
