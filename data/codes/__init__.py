"""Codes on disk: the memory-mapped store, the published jsonl, and the way from one to the other.

Not here: how images become codes (scripts/pretokenize.py, modeling/tokenizers), and who reads which (data/).
"""
