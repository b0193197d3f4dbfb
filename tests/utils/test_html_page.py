"""Pages of HTML: complete without other files, and text is escaped."""

from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from utils.html_page import commands, heading, page, paragraph, picture, table


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_has_its_parts_and_needs_no_other_file(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    parts = [
        heading("A & B"),
        paragraph("<script>alert(1)</script>"),
        commands('echo "$A" > b'),
        table([("x <y>", "1")], header=("name", "value")),
        picture(tmp_path / "a.png", 'of "a"'),
    ]
    reader = Reader()
    reader.feed(page("t < u", parts))
    assert "script" not in reader.tags
    for text in ("t < u", "A & B", "<script>alert(1)</script>", 'echo "$A" > b', "x <y>", 'of "a"'):
        assert text in reader.text
    assert reader.tags.count("td") == reader.tags.count("th") == 2
    assert len(reader.sources) == 1
    assert reader.sources[0].startswith("data:image/png;base64,")
