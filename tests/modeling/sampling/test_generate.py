import copy
import dataclasses
import hashlib
import importlib.util
import shutil
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from modeling.blocks import Block, modulate
from modeling.orders import random_orders
from modeling.rear import ReAR
from modeling.sampling import cached_decoding
from modeling.sampling import generate as generate_module
from modeling.sampling.cached_decoding import BUCKET
from modeling.sampling.generate import (
    CodeSampler,
    filter_logits,
    generate,
    guidance_schedule,
    guide,
    sample_codes,
)
from utils.randomness import Stream, image_uniforms
from utils.schema import GeneratorConfig, ModelConfig, VQModelConfig


def recompute(
    model: ReAR, labels: torch.Tensor, uniforms: torch.Tensor, config, orders=None, given=None
) -> torch.Tensor:
    """The whole prefix through the training forward for every code; `given` has -1 for codes to sample."""
    codes, images = torch.zeros(len(labels), model.image_seq_len, dtype=torch.long), torch.arange(len(labels))
    scales = guidance_schedule(config.guidance_scale, config.guidance_scale_pow, model.image_seq_len)
    for k in range(model.image_seq_len):
        with torch.no_grad():
            cond = model(codes, labels, orders).logits[:, k]
            uncond = model(codes, torch.full_like(labels, model.num_classes), orders).logits[:, k]
        found = sample_codes(guide(cond, uncond, scales[k]) / config.randomize_temperature, uniforms[:, k])
        index = torch.tensor(k) if orders is None else orders[:, k]
        if given is not None:
            found = torch.where(given[images, index] < 0, found, given[images, index])
        codes[images, index] = found
    return codes


class ReplayedOnCpu:
    """In place of `StepGraphs`: its warm-up and its lengths of attention, without a GPU to capture on."""

    def __init__(self, step: Callable[[int], object], ends: list[int]) -> None:
        self.step, self.ends = step, ends
        for end in ends:
            step(end)

    def replay(self, end: int) -> None:
        assert end in self.ends
        self.step(end)


@pytest.fixture(params=["cpu", "gpu", "graphs"])
def device_code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of each kind of device, run on a CPU: attention by two products over the exact length; by SDPA; by SDPA
    over whole buckets, masked beyond the position, as CUDA graphs replay it."""
    if request.param != "cpu":
        for module in (cached_decoding, generate_module):
            monkeypatch.setattr(module, "on_gpu", lambda device: True)
    if request.param == "graphs":
        monkeypatch.setattr(generate_module, "compiles", lambda compile_mode, device: True)
        monkeypatch.setattr(torch, "compile", lambda function, options: function)
        monkeypatch.setattr(generate_module, "StepGraphs", ReplayedOnCpu)


def random_model(hidden_size: int, layers: int, heads: int, steps: int) -> tuple[ReAR, GeneratorConfig]:
    generator = GeneratorConfig(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * hidden_size,
        image_seq_len=steps,
        condition_num_classes=7,
        guidance_scale=3.0,
        transition_alignment=False,
    )
    torch.manual_seed(1)
    model = ReAR(ModelConfig(vq_model=VQModelConfig(codebook_size=40), generator=generator))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval(), generator


@pytest.mark.usefixtures("device_code")
@pytest.mark.parametrize("shape", [(32, 2, 4, 16), (48, 3, 2, 33), (24, 1, 3, 70)])
def test_cached_decoding_equals_recomputation(shape: tuple[int, ...]) -> None:
    model, config = random_model(*shape)
    labels, sample = torch.tensor([0, 1, 6, 6, 3]), CodeSampler(model, config)
    for seed in range(3):
        uniforms = image_uniforms(seed, list(range(5)), shape[-1])
        fast = sample(labels, uniforms)
        assert torch.equal(fast, recompute(model, labels, uniforms, config))
        assert len(fast.unique()) > 5


class ParallelBlock(Block):
    """Attention and MLP both read the block's input."""

    def after_attention(self, x, attended, modulation, rows):
        hidden = self.mlp(modulate(x, modulation.shift_mlp, modulation.scale_mlp, rows))
        return x + self.attn.merge_heads(attended) + hidden


@pytest.mark.parametrize("compile_mode", ["off", "on"])
def test_another_block_is_decoded_as_it_is_trained(compile_mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, options: function)
    monkeypatch.setattr("modeling.rear.Block", ParallelBlock)
    model, config = random_model(32, 2, 4, 16)
    labels, uniforms = torch.tensor([0, 1, 6, 6, 3]), image_uniforms(0, list(range(5)), 16)
    sample = CodeSampler(model, config, compile_mode=compile_mode)
    assert torch.equal(sample(labels, uniforms), recompute(model, labels, uniforms, config))


@pytest.mark.usefixtures("device_code")
@pytest.mark.parametrize("shape", [(32, 2, 4, 16), (24, 1, 3, 70)])
def test_cached_decoding_in_random_orders_equals_recomputation(shape: tuple[int, ...]) -> None:
    model, config = random_model(*shape)
    config.order = "random"
    labels, sample = torch.tensor([0, 1, 6, 6, 3]), CodeSampler(model, config)
    for seed in range(2):
        uniforms = image_uniforms(seed, list(range(5)), shape[-1])
        orders = random_orders(image_uniforms(seed, list(range(5)), shape[-1], Stream.SAMPLING_ORDERS))
        fast = sample(labels, uniforms, orders=orders)
        assert torch.equal(fast, recompute(model, labels, uniforms, config, orders))
        raster = torch.arange(shape[-1]).expand(5, -1)
        assert torch.equal(sample(labels, uniforms, orders=raster), sample(labels, uniforms))
        assert not torch.equal(fast, sample(labels, uniforms))


@pytest.mark.usefixtures("device_code")
def test_one_step_serves_all_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers, compiled functions and graphs are made once: an order is data, and so are given codes."""
    model, config = random_model(32, 2, 4, 16)
    config.order = "random"
    sample, made = CodeSampler(model, config), []
    original = CodeSampler._prepare
    monkeypatch.setattr(CodeSampler, "_prepare", lambda *arguments: made.append(1) or original(*arguments))
    labels, uniforms = torch.tensor([2, 5]), image_uniforms(0, [0, 1], 16)
    for seed in range(3):
        orders = random_orders(image_uniforms(seed, [0, 1], 16, Stream.SAMPLING_ORDERS))
        codes = sample(labels, uniforms, orders=orders)
        assert torch.equal(codes, generate(model, labels, uniforms, config, orders))
    sample(labels, uniforms)
    sample(labels, uniforms, conditioning_codes=codes, conditioning_mask=codes < 20)
    assert len(made) == 1 + 3


@pytest.mark.usefixtures("device_code")
@pytest.mark.parametrize("in_random_order", [False, True])
def test_given_codes_come_first_and_stay(in_random_order: bool) -> None:
    model, config = random_model(32, 2, 4, 40)
    config.order = "annealed"
    labels, uniforms = torch.tensor([2, 5, 7]), image_uniforms(0, [0, 1, 2], 40)
    orders = random_orders(image_uniforms(0, [0, 1, 2], 40, Stream.SAMPLING_ORDERS)) if in_random_order else None
    given, mask = torch.randint(40, (3, 40)), torch.rand(3, 40) < torch.tensor([[0.2], [0.5], [0.9]])
    codes = generate(model, labels, uniforms, config, orders, given, mask)
    assert torch.equal(codes[mask], given[mask])
    rest = torch.arange(40).expand(3, -1) if orders is None else orders
    by_hand = [
        [c for c in row if m[c]] + [c for c in row if not m[c]] for row, m in zip(rest.tolist(), mask, strict=True)
    ]
    only_given = torch.where(mask, given, -1)
    assert torch.equal(codes, recompute(model, labels, uniforms, config, torch.tensor(by_hand), only_given))
    everything = torch.ones_like(mask)
    assert torch.equal(generate(model, labels, uniforms, config, orders, given, everything), given)
    nothing = generate(model, labels, uniforms, config, orders, given, ~everything)
    assert torch.equal(nothing, generate(model, labels, uniforms, config, orders))


@pytest.mark.usefixtures("device_code")
def test_in_raster_order_a_given_prefix_is_completed() -> None:
    """The teacher-forced prefix and the free run behind it; prefixes of any length together."""
    model, config = random_model(32, 2, 4, 40)
    labels, uniforms = torch.tensor([2, 5, 6]), image_uniforms(0, [0, 1, 2], 40)
    free = generate(model, labels, uniforms, config)
    mask = torch.arange(40) < torch.tensor([[7], [33], [0]])
    assert torch.equal(generate(model, labels, uniforms, config, conditioning_codes=free, conditioning_mask=mask), free)
    given = torch.randint(40, (3, 40), generator=torch.manual_seed(0), dtype=torch.int32)
    codes = generate(model, labels, uniforms, config, conditioning_codes=given, conditioning_mask=mask)
    only_given = torch.where(mask, given, -1).long()
    assert torch.equal(codes, recompute(model, labels, uniforms, config, given=only_given))
    assert torch.equal(codes[mask], given[mask].long())
    assert torch.equal(codes[2], free[2])
    assert not torch.equal(codes[:2], free[:2])
    with pytest.raises(ValueError, match="image 0: found code 33 before code 0, expected raster order"):
        generate(model, labels, uniforms, config, conditioning_codes=given, conditioning_mask=mask.flip(1))


def test_golden_codes() -> None:
    """Codes for a seed, of the code before the layers of the decode step were compiled together."""
    model, config = random_model(48, 3, 2, 70)
    codes = generate(model, torch.tensor([0, 1, 6, 6, 3]), image_uniforms(0, list(range(5)), 70), config)
    digest = "d95ca76ec4510735df93ec27192df258db1afa8c8a21d1147c3f343a7a477a38"
    assert hashlib.sha256(codes.numpy().tobytes()).hexdigest() == digest


@pytest.mark.usefixtures("device_code")
@pytest.mark.parametrize("steps", [1, 2, BUCKET - 1, BUCKET])
def test_sequences_that_end_at_the_edge_of_a_bucket(steps: int) -> None:
    model, config = random_model(32, 2, 4, steps)
    labels, uniforms = torch.tensor([2, 5]), image_uniforms(0, [0, 1], steps)
    assert torch.equal(generate(model, labels, uniforms, config), recompute(model, labels, uniforms, config))


@pytest.mark.usefixtures("device_code")
def test_nothing_is_left_of_the_batch_before(tiny_model: ReAR, tiny_config: ModelConfig) -> None:
    """Buffers are reused: batches of other classes, another number of classes and another size in between."""
    sample = CodeSampler(tiny_model, tiny_config.generator)
    batches = [[0, 1, 2], [3, 3, 3], [4], [1, 1, 0]]
    for seed, labels in enumerate(torch.tensor(batch) for batch in batches):
        uniforms = image_uniforms(seed, list(range(len(labels))), 16)
        assert torch.equal(sample(labels, uniforms), generate(tiny_model, labels, uniforms, tiny_config.generator))


@pytest.mark.usefixtures("device_code")
def test_top_k_and_temperature_enter(tiny_model: ReAR, tiny_config: ModelConfig) -> None:
    labels, uniforms = torch.tensor([3, 2]), image_uniforms(0, [0, 1], 16)
    greedy = dataclasses.replace(tiny_config.generator, top_k=1)
    cold = dataclasses.replace(tiny_config.generator, randomize_temperature=1e-4)
    greedy_codes = generate(tiny_model, labels, uniforms, greedy)
    assert torch.equal(greedy_codes, generate(tiny_model, labels, uniforms, cold))
    assert not torch.equal(greedy_codes, generate(tiny_model, labels, uniforms, tiny_config.generator))


@pytest.mark.usefixtures("device_code")
def test_bfloat16_stays_close() -> None:
    """Codes are equal up to the first rounding tie; the model itself stays float32."""
    model, config = random_model(32, 2, 4, 40)
    labels, uniforms = torch.arange(7), image_uniforms(0, list(range(7)), 40)
    exact = generate(model, labels, uniforms, config)
    rounded = CodeSampler(model, config, torch.bfloat16)(labels, uniforms)
    assert (exact == rounded).float().mean() > 0.5
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_auto_falls_back_with_one_line(
    tiny_model: ReAR, tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(function: Callable, options: object) -> None:
        raise RuntimeError("no compiler here\nand a second line")

    monkeypatch.setattr(generate_module, "compiles", lambda compile_mode, device: compile_mode != "off")
    monkeypatch.setattr(torch, "compile", refuse)
    labels, uniforms, notices = torch.tensor([0, 1]), image_uniforms(0, [0, 1], 16), []
    sample = CodeSampler(tiny_model, tiny_config.generator, compile_mode="auto", notice=notices.append)
    for _ in range(2):
        fast = sample(labels, uniforms)
    assert torch.equal(fast, generate(tiny_model, labels, uniforms, tiny_config.generator))
    sample(labels[:1], uniforms[:1])  # buffers of another size: not tried again
    assert len(notices) == 1
    assert notices[0].endswith("no compiler here")
    with pytest.raises(RuntimeError, match="no compiler"):
        CodeSampler(tiny_model, tiny_config.generator, compile_mode="on")(labels, uniforms)


def test_what_is_compiled_where() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [generate_module.compiles(mode, cpu) for mode in ("auto", "on", "off")] == [False, True, False]
    assert [generate_module.compiles(mode, cuda) for mode in ("auto", "on", "off")] == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_part_of_a_step_is_compiled_once(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Once for all layers and positions; all but the generation of code, which needs a compiler."""
    model, config = random_model(32, 3, 4, 40)
    labels, uniforms = torch.tensor([0, 1, 1]), image_uniforms(0, [0, 1, 2], 40)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    sample = CodeSampler(model, config, dtype, compile_mode="on")
    for _ in range(2):
        compiled = sample(labels, uniforms)
    assert torch.equal(compiled, CodeSampler(model, config, dtype)(labels, uniforms))
    assert counter.frame_count == 4 + 2  # modulations of a block and of the final layer


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None or importlib.util.find_spec("torch._inductor") is None, reason="needs a C++ compiler"
)
def test_compiled_on_cpu() -> None:
    model, config = random_model(32, 3, 4, 40)
    labels, uniforms = torch.tensor([0, 1, 1]), image_uniforms(0, [0, 1, 2], 40)
    torch._dynamo.reset()
    compiled = CodeSampler(model, config, compile_mode="on")(labels, uniforms)
    assert torch.equal(compiled, generate(model, labels, uniforms, config))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and TESTS_ON_GPU=1")
@pytest.mark.parametrize("compile_mode", ["on", "off"])
def test_graph_equals_recomputation(compile_mode: str) -> None:
    model, config = random_model(64, 2, 4, 70)
    sample = CodeSampler(copy.deepcopy(model).cuda(), config, compile_mode=compile_mode)
    for labels in (torch.tensor([0, 1, 6]), torch.tensor([2, 2, 2]), torch.tensor([5])):
        uniforms = image_uniforms(0, list(range(len(labels))), 70)
        wanted = recompute(model, labels, uniforms, config)
        assert (sample(labels, uniforms).cpu() == wanted).float().mean() > 0.99


@pytest.mark.usefixtures("device_code")
def test_guidance_one_equals_the_conditional_sequences_alone(tiny_model: ReAR, tiny_config: ModelConfig) -> None:
    labels, uniforms = torch.tensor([3, 2]), image_uniforms(0, [0, 1], 16)
    config = dataclasses.replace(tiny_config.generator, guidance_scale=1.0)
    fast = generate(tiny_model, labels, uniforms, config)
    assert torch.equal(fast, recompute(tiny_model, labels, uniforms, config))


@pytest.mark.usefixtures("device_code")
@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_an_image_does_not_depend_on_its_batch(tiny_model: ReAR, tiny_config: ModelConfig, batch_size: int) -> None:
    def sample(indices: list[int]) -> torch.Tensor:
        labels = torch.tensor(indices) % 5
        return generate(tiny_model, labels, image_uniforms(9, indices, 16), tiny_config.generator)

    together = sample(list(range(24)))
    pieces = [sample(list(range(i, min(i + batch_size, 24)))) for i in range(0, 24, batch_size)]
    assert torch.equal(torch.cat(pieces), together)


def test_guidance_schedule_by_hand() -> None:
    # N = 4, g = 5, pow = 1: (1 - cos(pi k / 4)) / 2 = 0, 0.1464, 0.5, 0.8536
    assert guidance_schedule(5.0, 1.0, 4) == pytest.approx([1.0, 1.5858, 3.0, 4.4142], abs=1e-4)
    assert guidance_schedule(1.0, 2.5, 8) == [1.0] * 8
    assert guide(torch.tensor(3.0), torch.tensor(1.0), 2.0) == 5.0


def test_sample_codes_follow_the_distribution() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.0, 0.7]]).log().expand(4, -1)
    assert sample_codes(logits, torch.tensor([0.0, 0.099, 0.101, 0.31])).tolist() == [0, 0, 1, 3]
    largest = torch.full((4,), 1 - 2**-24)
    assert sample_codes(torch.randn(4, 1000), largest).max() <= 999
    uniforms = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    counts = sample_codes(logits[:1].expand(20000, -1), uniforms).bincount(minlength=4) / 20000
    torch.testing.assert_close(counts, torch.tensor([0.1, 0.2, 0.0, 0.7]), atol=0.02, rtol=0)


def test_top_k_and_top_p() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    assert filter_logits(logits, 2, 1.0).isfinite().tolist() == [[False, True, False, True]]
    assert filter_logits(logits, 0, 0.65).isfinite().tolist() == [[False, True, False, True]]
    assert filter_logits(logits, 0, 0.75).isfinite().tolist() == [[False, True, True, True]]
    assert filter_logits(logits, 0, 1e-9).isfinite().sum() == 1
    assert torch.equal(filter_logits(logits, 0, 1.0), logits)
