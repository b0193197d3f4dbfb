"""Token ids of images on disk: the memory-mapped store, the published jsonl, conversion between them."""
