# python docs/examples/llama.py
"""reAR's regularization of the Llama of `transformers`, here tiny and with random weights: some seconds on a CPU.

`transformers` is in requirements-dev.txt. Nothing is downloaded; the codes are made up.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append("modeling")  # elsewhere: a copy of modeling/robust_embedding.py
from robust_embedding import RobustEmbedding

VOCAB, LENGTH, CLASSES, WIDTH, LAYERS, STEPS = 32, 16, 4, 64, 4, 100


def made_up_codes(batch: int) -> tuple[Tensor, Tensor]:
    """Each class counts in steps of its own, from a random code."""
    labels, start = torch.randint(CLASSES, (batch,)), torch.randint(VOCAB, (batch, 1))
    return labels, (start + (1 + labels[:, None]) * torch.arange(LENGTH)) % VOCAB


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=VOCAB + CLASSES,  # a class is a token behind the codes
    hidden_size=WIDTH,
    intermediate_size=2 * WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
)
model, codebook = LlamaForCausalLM(config).train(), torch.randn(VOCAB, 8)  # of a tokenizer, elsewhere
robust = RobustEmbedding(codebook, WIDTH, projection_dim=128)
robust.attach(model, encode="model.layers.0", decode=f"model.layers.{LAYERS * 3 // 4}", prefix=1)
optimizer = torch.optim.AdamW([*model.parameters(), *robust.parameters()], lr=4e-3)
for step in range(STEPS):
    labels, codes = made_up_codes(16)
    perturbed, mask = robust.perturb(codes, progress=step / STEPS)
    tokens = torch.cat([VOCAB + labels[:, None], perturbed], dim=1)  # (B, 1 + N): class, x1 .. xN
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]  # of x1 .. xN
    ar_loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
    loss = ar_loss + robust.loss(codes, mask)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0 or step == STEPS - 1:
        print(f"step {step + 1:3}  loss {loss.item():.4f}  cross-entropy {ar_loss.item():.4f}")
