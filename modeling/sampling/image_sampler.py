"""From the indices of images to their bytes, as the config asks for: what the sampler and the sweep share."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeling.rear import ReAR
from modeling.sampling.generate import CodeSampler
from modeling.sampling.image_decoder import ImageDecoder, KeptCodes
from modeling.sampling.image_inputs import image_inputs, image_orders
from modeling.tokenizers.tokenizer import Tokenizer
from utils.schema import Config


class ImageSampler:
    """Samples batches of up to `batch_size` images; kept, it prepares for them once.

    A smaller batch is filled up with its last index while it is sampled: one of another size would be compiled anew,
    and its codes could depend on what this process has sampled before.

    Args:
        model, tokenizer: on the same device, in eval mode; their weights must not change while this object is used.
        config: the sections `sampling` and `model.generator` are read, the latter for guidance, temperature and so on.
        notice: receives what `sampling.compile=auto` had to give up, one line.
        exact: in float32 and not compiled, whatever the config says.

    Attributes:
        decoder: from these codes to images, or of a tokenizer without images to the codes themselves.

    Raises:
        ValueError: model and tokenizer of other codes, a model in another precision, or a value outside its range.
    """

    def __init__(
        self,
        model: ReAR,
        tokenizer: Tokenizer,
        config: Config,
        batch_size: int,
        notice: Callable[[str], object] = print,
        exact: bool = False,
    ) -> None:
        of_model, of_tokenizer = ((one.image_seq_len, one.codebook_size) for one in (model, tokenizer))
        if of_model != of_tokenizer:
            raise ValueError(
                f"tokenizer of {of_tokenizer} codes (of an image, in all): expected {of_model} of the model"
            )
        self.model, self.sampling, self.batch_size = model, config.sampling, batch_size
        precision, compile_mode = ("no", "off") if exact else (self.sampling.mixed_precision, self.sampling.compile)
        on_gpu = model.cls_token.device.type == "cuda"
        reduced = precision == "bf16" or (precision == "auto" and on_gpu)
        dtype = torch.bfloat16 if reduced else torch.float32
        self.sampler = CodeSampler(model, config.model.generator, dtype, compile_mode, notice)
        self.decoder: ImageDecoder | KeptCodes = KeptCodes(tokenizer.codebook_size)
        if tokenizer.has_images:
            half_decoder = torch.float16 if reduced and on_gpu else torch.float32
            self.decoder = ImageDecoder(tokenizer, config.sampling.uint8_rule, half_decoder)

    def configure(self, config: Config) -> None:
        """Sample with this seed, order, guidance, temperature, top-k and top-p from now on; all else stays.

        Raises:
            ValueError: a value outside its range.
        """
        self.sampler.configure(config.model.generator)
        self.sampling = config.sampling

    def codes(
        self,
        indices: Sequence[int],
        class_labels: Tensor | None = None,
        on_step: Callable[[], object] = lambda: None,
    ) -> Tensor:
        """Codes (B, N) of the images with these indices; a GPU may still be at work on them.

        Args:
            class_labels: (B,), in place of those that belong to the indices.
            on_step: called after each code.

        Raises:
            ValueError: a class label that the model does not know, or an order that it was not trained for.
        """
        filled = [*indices, *[indices[-1]] * (self.batch_size - len(indices))]
        labels, uniforms = image_inputs(filled, self.model, self.sampling.seed)
        if class_labels is not None:
            labels = torch.cat([class_labels, class_labels[-1:].expand(len(filled) - len(class_labels))])
        orders = image_orders(filled, self.model.image_seq_len, self.sampling)
        return self.sampler(labels, uniforms, on_step, orders)[: len(indices)]

    def __call__(
        self,
        indices: Sequence[int],
        class_labels: Tensor | None = None,
        on_step: Callable[[], object] = lambda: None,
    ) -> np.ndarray:
        """The images (B, H, W, 3) uint8 with these indices, or codes (B, N) uint16; arguments as for `codes`.

        Raises:
            ValueError: as `codes`.
            NonFiniteError: logits or pixels that are not finite.
        """
        pending: Any = self.decoder.start(self.codes(indices, class_labels, on_step))
        return self.decoder.finish(pending)
