"""The page of scripts/demo.py."""

import html
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from scripts.demo_model import MAX_BYTES, DemoModel, Settings, read_upload
from utils.errors import InputError, environment_error, first_line
from utils.keys import Seed

for name in [name for name in os.environ if name.startswith("GRADIO_")]:
    del os.environ[name]  # the page has keys; Kubernetes sets GRADIO_SERVER_PORT=tcp://... for a service of that name
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "no_proxy": "*"}  # a proxy does not find this machine's page
import gradio as gr
from starlette.responses import PlainTextResponse

CANVAS = 384  # pixels, of the drawing canvas
BRUSH = "brush"
REGIONS = [  # label of the completed region, and the conditioning region
    ("the brushed area", BRUSH),
    ("below", "top"),
    ("right", "left"),
    ("around the middle", "center"),
    ("the middle", "border"),
]
MAX_TOTAL_BYTES = 1_000_000_000  # of uploads and pictures, which are kept for about an hour
MAX_REQUEST_BYTES = MAX_BYTES + 1_000_000  # an upload and its headers
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}  # across all clicks
BUTTONS = ["download", "fullscreen"]  # gradio's defaults include one that uploads the picture


class Numbers(msgspec.Struct):
    """What a click sends besides pictures."""

    class_label: int
    count: int
    seed: Seed | None
    guidance_scale: float
    randomize_temperature: float
    top_k: int
    top_p: float

    @classmethod
    def of(cls, values: tuple[Any, ...]) -> "Numbers":
        """Raises InputError for values of other types, which the page does not send, but the API may."""
        try:
            return msgspec.convert(dict(zip(cls.__struct_fields__, values, strict=True)), cls)
        except msgspec.ValidationError as error:
            raise InputError(first_line(error)) from error

    @property
    def settings(self) -> Settings:
        return Settings(*(getattr(self, name) for name in Settings._fields))


class Page(gr.Blocks):
    async def preprocess_data(self, *arguments: Any, **options: Any) -> Any:
        """Values for the components, for which the API may send anything; without a traceback."""
        try:
            return await super().preprocess_data(*arguments, **options)
        except Exception as error:
            problem = error.message if isinstance(error, gr.Error) else "found a value of another type than expected"
            raise gr.Error(html.escape(problem[:200]), print_exception=False) from error


class LimitedUploads:
    """ASGI middleware: refuses requests of too many bytes, and uploads while `folder` is full."""

    def __init__(self, app: Any, folder: Path) -> None:
        self.app, self.folder = app, folder

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        refusal = self.refusal(scope) if scope["type"] == "http" and scope["method"] == "POST" else None
        app = self.app if refusal is None else PlainTextResponse(refusal[1], status_code=refusal[0])
        await app(scope, receive, send)

    def refusal(self, scope: dict[str, Any]) -> tuple[int, str] | None:
        """Status and reason."""
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            return 411, "expected a Content-Length"
        if int(length) > MAX_REQUEST_BYTES:
            return 413, f"found {int(length)} bytes, expected at most {MAX_REQUEST_BYTES}"
        if scope["path"].endswith("/upload") and bytes_in(self.folder) + int(length) > MAX_TOTAL_BYTES:
            return 507, "the page has too many pictures at the moment; try again in an hour"
        return None


def bytes_in(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # gradio deletes old ones
                total += os.stat(f"{parent}/{name}").st_size
    return total


def build_page(model: DemoModel, max_images: int) -> gr.Blocks:
    generator = model.config.model.generator
    scale, temperature = generator.guidance_scale or 1.0, generator.randomize_temperature
    step = "" if model.weights.step is None else f", step {model.weights.step}"
    with Page(title="reAR", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"## reAR\n`{model.config.experiment.generator_checkpoint}`{step}")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                choices = [(name, class_id) for class_id, name in enumerate(model.classes)]
                class_label = gr.Dropdown(choices, value=0, label="class", elem_id="class")
                numbers = [  # number of images, seed and the fields of `Settings`
                    gr.Slider(1, max_images, value=min(4, max_images), step=1, label="images", elem_id="count"),
                    gr.Number(model.config.sampling.seed, precision=0, minimum=0, label="seed", elem_id="seed"),
                    gr.Slider(1, max(20, scale), scale, step=0.05, label="guidance (1: none)"),
                    gr.Slider(0.1, max(2, temperature), temperature, step=0.01, label="temperature"),
                    gr.Slider(0, model.tokenizer.codebook_size, generator.top_k, step=1, label="top-k (0: all)"),
                    gr.Slider(0.05, 1, generator.top_p, step=0.01, label="top-p (1: all)"),
                ]
                gr.Markdown("A picture to complete and reconstruct:")
                upload = gr.UploadButton("Upload a picture", elem_id="upload")
                last = len(model.validation or ()) - 1
                label = f"or a validation image, 0 to {last}"
                index = gr.Number(0, precision=0, minimum=0, maximum=last, label=label, visible=last >= 0)
                take = gr.Button("Take it", visible=last >= 0, elem_id="take")
            with gr.Column(scale=3):
                with gr.Tab("Sample"):
                    sample_tab(model, class_label, numbers)
                with gr.Tab("Complete", visible=model.has_grid):
                    original, canvas = complete_tab(model, class_label, numbers)
                with gr.Tab("Reconstruct"):
                    gr.Markdown("Samples cannot be more accurate than the tokenizer's reconstructions.")
                    with gr.Row():
                        shown, reconstruction = picture("original"), picture("reconstruction")
                    psnr = gr.Markdown(elem_id="psnr")

        def choose(image: np.ndarray) -> tuple[Any, ...]:
            large = np.asarray(Image.fromarray(image).resize((CANVAS, CANVAS), Image.Resampling.NEAREST))
            background = {"background": large, "layers": [], "composite": None}
            decoded, decibel = model.reconstruct(image)
            return image, background, image, decoded, f"PSNR {decibel:.2f} dB"

        def choose_upload(path: str | None) -> tuple[Any, ...]:
            with errors_shown():
                if path is None:
                    raise InputError("found no picture, expected one")
                return choose(read_upload(Path(path), model.config.dataset.preprocessing))

        def choose_validation(index: int | None) -> tuple[Any, ...]:
            with errors_shown():
                assert model.validation is not None, "the button is visible"
                return choose(model.validation[index or 0]["image"].numpy())

        outputs = [original, canvas, shown, reconstruction, psnr]
        upload.upload(choose_upload, upload, outputs, **ONE_AT_A_TIME)
        take.click(choose_validation, index, outputs, **ONE_AT_A_TIME)
    return page


def sample_tab(model: DemoModel, class_label: gr.Dropdown, numbers: list[gr.components.Component]) -> None:
    button = gr.Button("Sample", variant="primary", elem_id="sample")
    pictures = gallery("samples")

    def sample(*values: Any) -> list[np.ndarray]:
        with errors_shown():
            given = Numbers.of(values)
            return list(model.sample(given.class_label, given.count, given.seed or 0, given.settings))

    button.click(sample, [class_label, *numbers], pictures, **ONE_AT_A_TIME)


def complete_tab(
    model: DemoModel, class_label: gr.Dropdown, numbers: list[gr.components.Component]
) -> tuple[gr.State, gr.ImageEditor]:
    """The picture to complete, and the canvas that shows it."""
    original = gr.State()
    if not model.any_order:
        gr.Markdown("This model predicts codes in raster order: it completes the region below the conditioning tokens.")
    with gr.Row():
        canvas = gr.ImageEditor(
            type="numpy",
            sources=(),
            transforms=(),
            layers=False,
            brush=gr.Brush(default_size=48, colors=["#ff2d6f"], color_mode="fixed") if model.any_order else False,
            canvas_size=(CANVAS, CANVAS),
            fixed_canvas=True,
            format="png",
            label="to complete",
            elem_id="canvas",
        )
        with gr.Column():
            regions = REGIONS if model.any_order else REGIONS[1:2]
            region = gr.Radio(regions, value=regions[0][1], label="complete", elem_id="region")
            with_class = gr.Checkbox(False, label="with the class (without: no guidance)")
            button = gr.Button("Complete", variant="primary", elem_id="complete")
            stays = picture("stays", height=CANVAS // 2)
    pictures = gallery("completions")

    def complete(
        image: np.ndarray | None,
        drawn: dict[str, Any] | None,
        region: str,
        with_class: bool,
        *values: Any,
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        if image is None:
            raise gr.Error("first choose a picture", print_exception=False)
        with errors_shown():
            given = Numbers.of(values)
            kept = model.kept_around(brushed(drawn)) if region == BRUSH else model.kept_region(region)
            label = given.class_label if with_class else None
            images = model.complete(image, kept, label, given.count, given.seed or 0, given.settings)
            return model.hide(image, kept), list(images)

    inputs = [original, canvas, region, with_class, class_label, *numbers]
    button.click(complete, inputs, [stays, pictures], **ONE_AT_A_TIME)
    return original, canvas


def brushed(drawn: dict[str, Any] | None) -> np.ndarray:
    """Mask (CANVAS, CANVAS) bool of the pixels under the brush; None: the canvas was cleared. Raises InputError for
    layers of a different size."""
    layers = drawn["layers"] if drawn else []
    if wrong := [layer.shape for layer in layers if layer.shape != (CANVAS, CANVAS, 4)]:
        raise InputError(f"found a layer of {wrong[0]}, expected {CANVAS} x {CANVAS} pixels with transparency")
    return np.any([np.zeros((CANVAS, CANVAS), bool), *(layer[..., 3] > 0 for layer in layers)], axis=0)


@contextmanager
def errors_shown() -> Iterator[None]:
    """Errors that a visitor can fix become messages on the page."""
    try:
        yield
    except Exception as error:
        line = environment_error(error)
        if line is None:
            raise
        raise gr.Error(html.escape(line), print_exception=False) from error


def gallery(name: str) -> gr.Gallery:
    options = {"columns": 4, "height": "fit-content", "buttons": BUTTONS, "format": "png"}
    return gr.Gallery(label=name, elem_id=name, elem_classes="pictures", **options)


def picture(name: str, height: int = CANVAS) -> gr.Image:
    options = {"interactive": False, "height": height, "buttons": BUTTONS, "format": "png"}
    return gr.Image(label=name, elem_id=name, elem_classes="pictures", **options)
