"""Text from files in Markdown and on a terminal."""

import pytest
from huggingface_hub import ModelCard

from modeling.model_card import model_card
from utils.console import markdown_table, printable_text
from utils.errors import InputError

HOSTILE = [
    "a|b",
    "a\\|b",
    "two\nlines | and | cells",
    "<img src=x onerror=alert(1)>",
    "</td><script>alert(1)</script>",
    "[click](https://example.org)",
    "![](https://example.org/pixel.png)",
    "\x1b]0;title\x07\x1b[2J",
    "---\nlicense: mit\n---",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_cell_stays_a_cell(text: str) -> None:
    markdown_it = pytest.importorskip("markdown_it")
    table = markdown_table(["name", "value"], [[text, "1"]])
    html = markdown_it.MarkdownIt().enable("table").render(table)
    assert html.count("<td>") == html.count("<th>") == 2
    assert not any(tag in html for tag in ("<img", "<script", "<a "))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_card_has_its_own_facts_only(text: str) -> None:
    card = model_card(text, loading="model", facts={text: text}, metrics={text: text}, license="cc0-1.0")
    assert ModelCard(card).data.license == "cc0-1.0"
    assert card.count("\n---\n") == 1
    assert [line for line in card.splitlines() if line.startswith("#")][1:] == [
        *("## Loading", "## Model", "## Metrics", "## License")
    ]
    assert printable_text(card.replace("\n", "")) == card.replace("\n", "")


def test_errors_show_no_codes_of_a_terminal() -> None:
    assert str(InputError("a\x1b[2J\nb\udcff")) == "a\\x1b[2J\\nb\\udcff"
