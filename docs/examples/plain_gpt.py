# python docs/examples/plain_gpt.py
"""reAR's regularization of a plain GPT, which reads [class, x1 .. xN-1]: some seconds on a CPU, on made-up codes."""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append("modeling")  # elsewhere: a copy of modeling/robust_embedding.py
from robust_embedding import RobustEmbedding

VOCAB, LENGTH, CLASSES, WIDTH, LAYERS, STEPS = 32, 16, 4, 64, 4, 100


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classes, self.codes = nn.Embedding(CLASSES, WIDTH), nn.Embedding(VOCAB, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB))

    def forward(self, class_labels: Tensor, codes: Tensor) -> Tensor:
        x = torch.cat([self.classes(class_labels)[:, None], self.codes(codes[:, :-1])], dim=1) + self.positions
        causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        for block in self.blocks:
            x = block(x, src_mask=causal, is_causal=True)
        return self.head(x)  # (B, N, V): of x1 .. xN


def made_up_codes(batch: int) -> tuple[Tensor, Tensor]:
    """Each class counts in steps of its own, from a random code."""
    labels, start = torch.randint(CLASSES, (batch,)), torch.randint(VOCAB, (batch, 1))
    return labels, (start + (1 + labels[:, None]) * torch.arange(LENGTH)) % VOCAB


torch.manual_seed(0)
model, codebook = GPT(), torch.randn(VOCAB, 8)  # of a tokenizer, elsewhere
robust = RobustEmbedding(codebook, WIDTH, projection_dim=128)
robust.attach(model, encode="blocks.0", decode=f"blocks.{LAYERS * 3 // 4}", prefix=1, last_code=False)
optimizer = torch.optim.AdamW([*model.parameters(), *robust.parameters()], lr=4e-3)
for step in range(STEPS):
    labels, codes = made_up_codes(16)
    perturbed, mask = robust.perturb(codes, progress=step / STEPS)
    ar_loss = F.cross_entropy(model(labels, perturbed).flatten(0, 1), codes.flatten())
    loss = ar_loss + robust.loss(codes, mask)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0 or step == STEPS - 1:
        print(f"step {step + 1:3}  loss {loss.item():.4f}  cross-entropy {ar_loss.item():.4f}")
