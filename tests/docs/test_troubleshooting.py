"""Every message that docs/troubleshooting.md quotes is one of the sources."""

import ast
import re

import pytest

from tests.docs.pages import ROOT, prose

PAGE = ROOT / "docs/troubleshooting.md"
MESSAGES = re.findall(r"^Message: `(.+)`$", prose(PAGE), re.MULTILINE)
PACKAGES = ("data", "evaluation", "modeling", "scripts", "utils")


def template(node: ast.expr) -> str | None:
    """The text of a literal, with ... in place of each value of an f-string; None for other expressions."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
        return re.sub(r"\.{4,}", "...", "".join(map(str, parts)))
    return None


@pytest.fixture(scope="module")
def templates() -> list[str]:
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    return [text for node in nodes if isinstance(node, ast.expr) and (text := template(node)) is not None]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_in_the_sources(message: str, templates: list[str]) -> None:
    assert [text for text in templates if message in text], message
    assert len(re.findall(r"[a-z]+", message)) >= 2  # words, without which the line above could not fail


def test_all_messages_are_tested() -> None:
    assert len(MESSAGES) == prose(PAGE).count("Message:") >= 25
