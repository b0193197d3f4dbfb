"""README.md of a saved model, a model card of the Hugging Face Hub, with known facts only."""

from huggingface_hub import ModelCardData

from utils.console import markdown_table, markdown_text

CARD_FILE = "README.md"
TAGS = ["image-generation", "class-conditional", "autoregressive", "rear"]


def model_card(
    title: str,
    *,
    loading: str,
    facts: dict[str, object],
    metrics: dict[str, str] | None = None,
    picture: str = "",
    license: str | None = None,
) -> str:
    """
    Args:
        loading: Python code that loads the model.
        facts: rows of a table; None values are left out.
        metrics: rows of a second table.
        picture: Markdown below the title.
        license: Hub identifier; None: none stated.
    """
    parts = [
        f"---\n{ModelCardData(license=license, library_name='re-ar', tags=TAGS).to_yaml()}\n---",
        f"# {markdown_text(title)}",
        "A model of [reAR](https://arxiv.org/abs/2510.04450), class-conditional autoregressive image generation.",
        picture,
        "## Loading",
        "From the root of the sources of re-ar, or with them installed:",
        f"```python\n{loading}\n```",
        "`config.json` is also a config for the scripts of re-ar (`config=FOLDER/config.json`).",
        "## Model",
        markdown_table(["", ""], [[name, str(value)] for name, value in facts.items() if value is not None]),
    ]
    if metrics:
        parts += ["## Metrics", markdown_table(["metric", "value"], [list(row) for row in metrics.items()])]
    stated = f"{markdown_text(license)}, as stated by the exporter." if license else "None is stated for the weights."
    parts += ["## License", stated]
    return "\n\n".join(filter(None, parts)) + "\n"
