"""reAR: a GPT over tokenizer codes in raster or any order, with training-only projectors for embedding regularization.

Paper: https://arxiv.org/abs/2510.04450. The architecture, orders included, is RAR's (https://arxiv.org/abs/2411.00776).
The state-dict keys are the keys in the published weights and never change.

Legend: B images, N codes per image, T = N + 2 positions [cls, class, x1 .. xN], D hidden size, V codebook size,
C classes, U distinct labels of a batch, Z width of a codebook vector.

    position       0     1      2    ...   N      N + 1
    input          cls   class  x1   ...   xN-1   xN
    logits, next         x1     x2   ...   xN                (each predicts the code one position to the right)
    own                         x1   ...   xN-1   xN         (each recovers the code at its own position)

`own` and `next` are the positions that taps read: encode term `own`, decode term `next`.

With an order, x1 .. xN are the codes orders[0] .. orders[N - 1] of raster order. Position embeddings and target-aware
position embeddings are permuted with them, timestep embeddings are not.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modeling.blocks import Block, FinalLayer, gather_rows
from modeling.input_validation import checked_class_labels, checked_codes, checked_orders
from modeling.losses import TokenScores, head_scores
from modeling.pretrained_model import PretrainedModel
from modeling.robust_embedding import projector
from modeling.taps import PUBLISHED_TAPS, is_projector, projector_name, taps_of
from utils.files.weights import load_state_dict, load_strict
from utils.schema import Config, ModelConfig
from utils.token_ids import LARGE_CODEBOOK

# Unused rows of the published tables.
POSITION_SLACK = 1024
TIMESTEP_SLACK = 100


@dataclass
class ReAROutput:
    """Row i is for code x(i+1) in the order of the image."""

    logits: Tensor | TokenScores  # (B, N, V); of a codebook above LARGE_CODEBOOK, the scores of `target_codes`
    projections: dict[str, Tensor]  # by tap, (B, N, Z); none of a model without projectors


class ReAR(PretrainedModel):
    """Class-conditional autoregressive transformer.

    Args:
        config: `vq_model.codebook_size` and the `generator` section are read. With `transition_alignment: false`
            the projectors are not built, which leaves the plain AR model.

    Attributes:
        config: the argument; its guidance, temperature, top-k and top-p are the defaults of sampling.
        taps: hidden states that projectors read, in training only. The projector of a tap is the module
            `projector_name(tap)`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        generator = config.generator
        hidden_size = generator.hidden_size
        self.codebook_size = config.vq_model.codebook_size
        self.num_classes = generator.condition_num_classes
        self.image_seq_len = generator.image_seq_len
        self.use_checkpoint = generator.use_checkpoint
        self.taps = taps_of(generator)

        # Rows: codes, mask token, classes, null class.
        self.embeddings = nn.Embedding(self.codebook_size + 1 + self.num_classes + 1, hidden_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.pos_embed = nn.Parameter(torch.empty(1, self.image_seq_len + POSITION_SLACK, hidden_size))
        self.target_aware_pos_embed = nn.Parameter(torch.empty(1, self.image_seq_len + POSITION_SLACK, hidden_size))
        self.timesteps_embeddings = nn.Parameter(torch.empty(1, self.image_seq_len + TIMESTEP_SLACK, hidden_size))
        self.blocks = nn.ModuleList(
            Block(
                hidden_size=hidden_size,
                num_heads=generator.num_attention_heads,
                mlp_size=generator.intermediate_size,
                dropout=generator.dropout,
                attn_drop=generator.attn_drop,
            )
            for _ in range(generator.num_hidden_layers)
        )
        self.adaln_before_head = FinalLayer(hidden_size)
        self.lm_head = nn.Linear(hidden_size, self.codebook_size)

        drawn_first = () if generator.init_projectors_last else PUBLISHED_TAPS
        for tap in self.taps:
            if tap.name in drawn_first:
                self.add_module(projector_name(tap), projector(hidden_size, generator.projection_dim, tap.z_dim))
        self.init_weights()
        for tap in self.taps:
            if tap.name not in drawn_first:  # last, so that for a seed it leaves all other weights as they are
                mlp = projector(hidden_size, generator.projection_dim, tap.z_dim)
                init_layers(mlp)
                self.add_module(projector_name(tap), mlp)

    def sections(self) -> dict[str, Any]:
        return {"model": asdict(self.config)}

    @classmethod
    def from_config(cls, config: Config) -> "ReAR":
        return cls(config.model)

    @staticmethod
    def sampling_config(config: ModelConfig) -> ModelConfig:
        """The config of the same model without projectors."""
        return replace(config, generator=replace(config.generator, transition_alignment=False, taps=[]))

    def load_weights(self, path: Path) -> None:
        """Like the base class, except for projectors: a projector that the file lacks is removed, and a projector that
        this model lacks is not loaded."""
        state = load_state_dict(path)
        in_file = {key.partition(".")[0] for key in state if is_projector(key)}
        for tap in self.taps:
            if projector_name(tap) not in in_file:
                delattr(self, projector_name(tap))
        self.taps = [tap for tap in self.taps if projector_name(tap) in in_file]
        for name in in_file - {projector_name(tap) for tap in self.taps}:
            state = {key: value for key, value in state.items() if key.partition(".")[0] != name}
        load_strict(self, state, path)

    def init_weights(self) -> None:
        """Truncated normal (std 0.02) everywhere; zero for biases, cls token and adaLN outputs."""
        init_layers(self)
        for table in (self.pos_embed, self.target_aware_pos_embed, self.timesteps_embeddings):
            nn.init.trunc_normal_(table, std=0.02)
        nn.init.zeros_(self.cls_token)
        for module in (*self.blocks, self.adaln_before_head):
            nn.init.zeros_(module.adaLN_modulation[1].weight)

    @property
    def null_class(self) -> int:
        """The label of no class, for the unconditional branch of guidance and for dropped labels."""
        return self.num_classes

    @property
    def mask_code(self) -> int:
        """The mask token: an input only, never predicted."""
        return self.codebook_size

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay (timm's convention)."""
        return {"embeddings.weight", "cls_token", "pos_embed", "target_aware_pos_embed", "timesteps_embeddings"}

    def forward(
        self,
        codes: Tensor,
        class_labels: Tensor,
        orders: Tensor | None = None,
        class_rows: Tensor | None = None,
        target_codes: Tensor | None = None,
    ) -> ReAROutput:
        """Teacher-forced pass for training.

        Args:
            codes: (B, N) int, the (perturbed) context in raster order, 0 to V - 1, or `mask_code`.
            class_labels: (U,) int, 0 to C - 1, or `null_class`.
            orders: (B, N) int, for each image the codes 0 to N - 1 in the order of their prediction; None: raster.
            class_rows: (B,) int, the index into `class_labels` of each image; None: U = B, one label per image.
            target_codes: (B, N) int, the clean codes in the order of their prediction. With a codebook above
                LARGE_CODEBOOK, whose logits would fill the memory, the output has their scores in place of the logits.

        Raises:
            ValueError: other shapes or types or, on a CPU, other values; checking values would wait for a GPU.
        """
        on_cpu = codes.device.type == "cpu"
        codes = checked_codes(codes, self.image_seq_len, self.mask_code, check_values=on_cpu)
        class_labels = checked_class_labels(class_labels, self.num_classes, check_values=on_cpu)
        if orders is not None:
            orders = checked_orders(orders, codes.shape, check_values=on_cpu)
            codes = codes.gather(1, orders)
        prefix = gather_rows(self.embed_prefix(class_labels), class_rows)  # (B, 2, D)
        x = torch.cat([prefix, self.embeddings(codes)], dim=1)  # (B, T, D)
        x = x + self.position_table(orders)
        condition = self.condition(class_labels)  # (U, T, D)
        projections = {}
        for layer, block in enumerate(self.blocks):
            if self.use_checkpoint and self.training:
                x = checkpoint(block, x, condition, class_rows, use_reentrant=False)
            else:
                x = block(x, condition, class_rows)
            for tap in self.taps:
                if tap.block == layer:
                    projections[tap.name] = self.get_submodule(projector_name(tap))(tap.read(x, prefix=2))  # (B, N, Z)
        hidden = self.adaln_before_head(x[:, 1:-1], condition[:, 1:-1], class_rows)  # (B, N, D)
        if target_codes is not None and self.codebook_size > LARGE_CODEBOOK:
            return ReAROutput(head_scores(self.lm_head, hidden, target_codes), projections)
        return ReAROutput(self.lm_head(hidden), projections)

    def embed_prefix(self, class_labels: Tensor) -> Tensor:
        """(B,) class ids -> (B, 2, D) embeddings of [cls, class], without positions."""
        return torch.cat([self.cls_token.expand(len(class_labels), -1, -1), self._embed_class(class_labels)], dim=1)

    def position_table(self, orders: Tensor | None = None) -> Tensor:
        """(1, T, D), or (B, T, D) for orders (B, N): embedding of the position + embedding of the position it predicts.
        The cls token and the last code predict nothing."""
        length = self.image_seq_len + 2
        own, target_aware = self.pos_embed[:, :length], self.target_aware_pos_embed[:, 2:length]
        if orders is not None:
            prefix = own[:, :2].expand(len(orders), -1, -1)
            own = torch.cat([prefix, F.embedding(orders, own[0, 2:])], dim=1)  # (B, T, D)
            target_aware = F.embedding(orders, target_aware[0])  # (B, N, D)
        return own + F.pad(target_aware, (0, 0, 1, 1))

    def condition(self, class_labels: Tensor, positions: slice = slice(None)) -> Tensor:
        """(B,) class ids -> (B, T, D), or only `positions`: SiLU of class + timestep embedding, the input of adaLN."""
        timesteps = self.timesteps_embeddings[:, : self.image_seq_len + 2]
        return F.silu(self._embed_class(class_labels) + timesteps[:, positions])

    def _embed_class(self, class_labels: Tensor) -> Tensor:
        return self.embeddings(self.codebook_size + 1 + class_labels).unsqueeze(1)  # (B, 1, D)


def init_layers(module: nn.Module) -> None:
    """Truncated normal (std 0.02) for the weights of linear layers and embeddings in it, zero for biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(layer.weight, std=0.02)
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
