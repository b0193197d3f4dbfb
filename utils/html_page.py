"""A page of HTML in one file: pictures are inside, so that it can be copied to another machine and opened there."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
img { max-width: 100%; border: 1px solid #ddd }
figure { margin: 1rem 0; overflow-x: auto }
figcaption { color: #555; font-size: 0.9rem }
table { border-collapse: collapse }
th, td { text-align: left; padding: 0.2rem 1rem 0.2rem 0; border-bottom: 1px solid #ddd; vertical-align: top }
pre { background: #f5f5f5; padding: 0.7rem; overflow-x: auto }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """The text of the file; `parts` are results of the functions below."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width">\n<title>{escape(title)}</title>'
    body = "\n".join([f"<h1>{escape(title)}</h1>", *parts])
    return f'<!doctype html>\n<html lang="en">\n{head}\n<style>{STYLE}</style>\n{body}\n</html>\n'


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def commands(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in header)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"


def picture(path: Path, caption: str) -> str:
    """A figure from a PNG file, whose content is copied into the page."""
    content = base64.b64encode(path.read_bytes()).decode()
    image = f'<img src="data:image/png;base64,{content}" alt="{escape(caption)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
