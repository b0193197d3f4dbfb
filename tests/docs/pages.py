"""The pages of the documentation and the commands in them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def page_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def fences(page: Path) -> list[tuple[str, str]]:
    """Language and text of every fenced block."""
    return FENCE.findall(page.read_text())


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def commands(page: Path) -> list[str]:
    """The commands of the fenced blocks of bash."""
    return commands_of("\n".join(block for language, block in fences(page) if language == "bash"))


def commands_of(text: str) -> list[str]:
    """The commands of a text, without comments; those joined by && are several."""
    text = text.replace("\\\n", " ")
    lines = [" ".join(map(shlex.quote, shlex.split(line, comments=True))) for line in text.splitlines()]
    return [command for line in lines if line for command in line.split(" '&&' ")]
