"""How token ids are stored, and from which size of the codebook on its logits are too many to keep."""

import numpy as np

MAX_CODEBOOK_SIZE = 2**32  # of uint32
LARGE_CODEBOOK = 2**16  # the logits of a larger one are computed in slices, in the forward and in the backward pass
LOGITS_IN_SLICE = 2**27  # 512 positions of 2^18 tokens


def token_dtype(codebook_size: int) -> np.dtype:
    """uint16 for up to 65,536 tokens, else uint32."""
    return np.dtype(np.uint16 if codebook_size <= 2**16 else np.uint32)
