"""The alignment taps of a config: the encode and decode terms of the published keys, and the entries of `taps`.

What a tap reads and how it counts is in `modeling.robust_embedding.Tap`; what it is compared with, in
`modeling.targets.registry`.
"""

from modeling.robust_embedding import Tap
from utils.schema import GeneratorConfig, TapConfig

PUBLISHED_TAPS = ("encode", "decode")
PROJECTOR_SUFFIX = "_align_mlp"  # as in the published weights


def projector_name(tap: Tap) -> str:
    """Name of the projector in the model and in its state dict."""
    return tap.name + PROJECTOR_SUFFIX


def is_projector(key: str) -> bool:
    """Whether a key of a state dict belongs to a projector."""
    return key.partition(".")[0].endswith(PROJECTOR_SUFFIX)


def tap_configs(generator: GeneratorConfig) -> list[TapConfig]:
    """All taps that are trained: none without `transition_alignment`, and none of weight 0."""
    if not generator.transition_alignment:
        return []
    taps, target = [], generator.transition_alignment_target
    if generator.encode_align:
        encode = TapConfig("encode", target, layer=generator.encode_align_layer_idx, positions="own")
        encode.exclude = "perturbed" if generator.mask_perturbed_encode else "none"
        taps.append(encode)
    if generator.decode_align:
        taps.append(TapConfig("decode", target, layer=generator.decode_align_layer_idx, positions="next"))
    return [*taps, *(tap for tap in generator.taps if tap.weight > 0)]


def taps_of(generator: GeneratorConfig) -> list[Tap]:
    """`tap_configs` for the model and the loss."""
    return [
        Tap(
            name=tap.name,
            block=tap.layer,
            positions=tap.positions,
            z_dim=tap.z_dim or generator.z_dim,
            weight=tap.weight,
            exclude_perturbed=tap.exclude == "perturbed",
            end_step=tap.end_step,
        )
        for tap in tap_configs(generator)
    ]
