"""The page: its controls, and what they ask of the model. Everything that is computed stands in model.py."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported

import html
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from scripts.demo_page.model import DemoModel, Settings
from scripts.demo_page.uploads import MAX_BYTES, read_upload
from utils.errors import environment_error

CANVAS = 384  # pixels, of the picture under the brush
BRUSH = "what is brushed over"
REGIONS = {"below": "top", "right": "left", "around the middle": "center", "the middle": "border"}
COMPLETES = {
    "any": "This model was trained in random orders: it fills in any part of a picture.",
    "top": "This model predicts codes in raster order: it fills in what lies below a part that stays.",
    "none": "The tokenizer's codes have no grid: no part of a picture can be filled in.",
}
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
FONTS = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # of the visitor's machine
CSS = """
.pictures img {width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated}
.pictures .grid-wrap {overflow-y: auto}
"""
BUTTONS = ("download", "fullscreen")  # none that uploads


def launch(page: gr.Blocks, host: str, port: int) -> None:
    """Serve the page until Ctrl-C or SIGTERM."""
    font, font_mono = FONTS
    page.queue().launch(
        server_name=host,
        server_port=port,
        max_file_size=MAX_BYTES,
        theme=gr.themes.Default(font=font, font_mono=font_mono),
        css=CSS,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        share=False,
        ssr_mode=False,
        mcp_server=False,
        run_history=False,
        enable_monitoring=False,
    )
    print(f"http://{host}:{port} (Ctrl-C ends it)", flush=True)
    page.block_thread()


@contextmanager
def told() -> Iterator[None]:
    """What a visitor can mend becomes a message on the page."""
    try:
        yield
    except Exception as error:
        line = environment_error(error)
        if line is None:
            raise
        raise gr.Error(html.escape(line), print_exception=False) from error


def build_page(model: DemoModel) -> gr.Blocks:
    with gr.Blocks(title="reAR", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"## reAR\n{description(model)}")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                class_label, asked = controls(model)
            with gr.Column(scale=3):
                with gr.Tab("Sample"):
                    sample_tab(model, class_label, asked)
                with gr.Tab("Complete"):
                    complete_tab(model, class_label, asked)
                with gr.Tab("Reconstruct"):
                    reconstruct_tab(model)
    return page


def description(model: DemoModel) -> str:
    tokenizer = model.tokenizer
    parameters = sum(parameter.numel() for parameter in model.model.parameters()) / 1e6
    step = "" if model.weights.step is None else f", step {model.weights.step}"
    return (
        f"`{model.config.experiment.generator_checkpoint}`{step}: {parameters:.1f} M parameters, {len(model.classes)} "
        f"classes, {tokenizer.resolution} x {tokenizer.resolution} pixels, {tokenizer.image_seq_len} codes of "
        f"{tokenizer.codebook_size}"
    )


def controls(model: DemoModel) -> tuple[gr.Dropdown, list[gr.components.Component]]:
    """The class; number of images, seed and `Settings`."""
    config, most = model.config, model.max_images
    generator = config.model.generator
    choices = [(name, class_id) for class_id, name in enumerate(model.classes)]
    class_label = gr.Dropdown(choices, value=0, label="class", elem_id="class")
    count = gr.Slider(1, most, value=min(4, most), step=1, label="images", elem_id="count")
    seed = gr.Number(config.sampling.seed, precision=0, minimum=0, label="seed", elem_id="seed")
    scale, temperature = generator.guidance_scale or 1.0, generator.randomize_temperature
    settings = [
        gr.Slider(1, max(20, scale), scale, step=0.05, label="guidance (1: none)", elem_id="guidance"),
        gr.Slider(0.1, max(2, temperature), temperature, step=0.01, label="temperature", elem_id="temperature"),
    ]
    with gr.Accordion("truncation", open=False):
        most_codes = model.tokenizer.codebook_size
        settings.append(gr.Slider(0, most_codes, generator.top_k, step=1, label="top-k (0: all codes)"))
        settings.append(gr.Slider(0.05, 1, generator.top_p, step=0.01, label="top-p (1: all codes)"))
    return class_label, [count, seed, *settings]


def sample_tab(model: DemoModel, class_label: gr.Dropdown, asked: list[gr.components.Component]) -> None:
    button = gr.Button("Sample", variant="primary", elem_id="sample")
    pictures = gallery("samples")

    def sample(class_label: int, count: int, seed: int, *settings: Any) -> Iterator[list[np.ndarray]]:
        with told():
            for images in model.sample(class_label, count, seed, Settings(*settings)):
                yield list(images)

    button.click(sample, [class_label, *asked], pictures, **ONE_AT_A_TIME)


def complete_tab(model: DemoModel, class_label: gr.Dropdown, asked: list[gr.components.Component]) -> None:
    gr.Markdown(COMPLETES[model.completes])
    if model.completes == "none":
        return
    brushes, original = model.completes == "any", gr.State()
    use = picture_source(model, "complete")
    with gr.Row():
        canvas = brush_canvas() if brushes else picture("to complete")
        with gr.Column():
            regions = [BRUSH, *REGIONS] if brushes else ["below"]
            region = gr.Radio(regions, value=regions[0], label="fill in", elem_id="region")
            share = gr.Slider(0.1, 0.9, 0.5, step=0.05, label="share that stays", visible=not brushes, elem_id="share")
            with_class = gr.Checkbox(False, label="with the class (without: no guidance)", elem_id="with_class")
            button = gr.Button("Complete", variant="primary", elem_id="complete")
            stays = picture("stays", height=CANVAS // 2)
    pictures = gallery("completions")
    region.change(lambda name: gr.Slider(visible=name != BRUSH), region, share)

    def show(image: np.ndarray) -> tuple[np.ndarray, Any]:
        large = np.asarray(Image.fromarray(image).resize((CANVAS, CANVAS), Image.Resampling.NEAREST))
        return image, {"background": large, "layers": [], "composite": None} if brushes else large

    use(show, [original, canvas])

    def complete(
        image: np.ndarray | None,
        drawn: Any,
        region: str,
        share: float,
        with_class: bool,
        class_label: int,
        count: int,
        seed: int,
        *settings: Any,
    ) -> Iterator[tuple[Any, list[tuple[np.ndarray, str]]]]:
        if image is None:
            raise gr.Error("first choose a picture", print_exception=False)
        with told():
            kept = model.kept_around(brushed(drawn)) if region == BRUSH else model.kept_region(REGIONS[region], share)
            label = class_label if with_class else None
            yield model.without(image, kept), []
            for images in model.complete(image, kept, label, count, seed, Settings(*settings)):
                yield gr.skip(), [(one, f"seed {seed + k}") for k, one in enumerate(images)]

    inputs = [original, canvas, region, share, with_class, class_label, *asked]
    button.click(complete, inputs, [stays, pictures], **ONE_AT_A_TIME)


def reconstruct_tab(model: DemoModel) -> None:
    gr.Markdown("The tokenizer's codes of a picture, decoded: what is lost here is lost to every sample.")
    use = picture_source(model, "reconstruct")
    with gr.Row():
        shown = [picture("original"), picture("reconstruction")]
    figures = gr.Markdown(elem_id="figures")

    def reconstruct(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
        decoded, found = model.reconstruct(image)
        used = round(found["codebook_used"] * model.tokenizer.codebook_size)
        codes = f"{model.tokenizer.image_seq_len} codes, {used} of them different"
        return image, decoded, f"PSNR {found['psnr']:.2f} dB; {codes}"

    use(reconstruct, [*shown, figures])


def picture_source(model: DemoModel, name: str) -> Callable[[Callable[[np.ndarray], Any], list], None]:
    """Controls that give a picture: an upload, or a held-out image if there are some.

    Returns:
        What a function of a picture (H, W, 3) uint8 and the outputs for its result are given to.
    """
    with gr.Row():
        upload = gr.UploadButton("Upload a picture", size="md", elem_id=f"{name}_upload")
        if model.validation is not None:
            last = len(model.validation) - 1
            take = gr.Button(f"Take held-out 0 to {last}:", size="md", elem_id=f"{name}_take")
            number = gr.Number(0, precision=0, minimum=0, maximum=last, container=False, elem_id=f"{name}_number")

    def use(work: Callable[[np.ndarray], Any], outputs: list) -> None:
        def from_upload(path: str) -> Any:
            with told():
                return work(read_upload(Path(path), model.config.dataset.preprocessing))

        def from_heldout(number: int) -> Any:
            with told():
                return work(model.heldout_image(number)[0])

        upload.upload(from_upload, upload, outputs, **ONE_AT_A_TIME)
        if model.validation is not None:
            take.click(from_heldout, number, outputs, **ONE_AT_A_TIME)

    return use


def brushed(drawn: dict[str, Any] | None) -> np.ndarray:
    """Mask (H', W') bool of the pixels that a brush was over; None: the canvas was cleared."""
    layers = [layer[..., 3] > 0 for layer in drawn["layers"]] if drawn else []
    return np.any([np.zeros((CANVAS, CANVAS), bool), *layers], axis=0)


def gallery(name: str) -> gr.Gallery:
    return gr.Gallery(
        format="png",
        columns=4,
        height="fit-content",
        buttons=BUTTONS,
        label=name,
        elem_id=name,
        elem_classes="pictures",
    )


def picture(name: str, height: int = CANVAS) -> gr.Image:
    size = {"height": height, "format": "png"}
    return gr.Image(interactive=False, buttons=BUTTONS, label=name, elem_id=name, elem_classes="pictures", **size)


def brush_canvas() -> gr.ImageEditor:
    return gr.ImageEditor(
        type="numpy",
        sources=(),
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=48, colors=["#ff2d6f"], color_mode="fixed"),
        canvas_size=(CANVAS, CANVAS),
        fixed_canvas=True,
        format="png",
        label="to complete",
        elem_id="canvas",
    )
