"""Files, keys, links and folders that the pages name exist, and no sentence appears twice."""

import dataclasses
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.docs.pages import PAGES, ROOT, fences, page_name, prose
from utils.config import load_config
from utils.schema import Config

MADE_ELSEWHERE = ("outputs/", "train_generated_images/", "ckpt/", "dataset/")  # by runs, or downloaded
PACKAGES = ("modeling", "data", "evaluation", "scripts", "utils")


def keys_of(section: type, prefix: str = "") -> set[str]:
    keys = set()
    for field in dataclasses.fields(section):
        nested = dataclasses.is_dataclass(field.type)
        keys |= keys_of(field.type, f"{prefix}{field.name}.") if nested else {f"{prefix}{field.name}"}
    return keys


def in_backticks(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def slug(heading: str) -> str:
    """The anchor that a heading gets on the pages of a Git host."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.is_file(), target
        assert not anchor or anchor in map(slug, re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)), target


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_named_files_and_folders_exist(page: Path) -> None:
    for name in in_backticks(page):
        if re.fullmatch(r"\w+(/[\w-]+)*/([\w-]+\.\w+)?", name) and not name.startswith(MADE_ELSEWHERE):
            assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_named_keys_exist(page: Path) -> None:
    known = keys_of(Config)
    sections = {key.split(".")[0] for key in known}
    for words in in_backticks(page):
        for name in re.findall(r"(?<![\w./])[a-z_]+(?:\.[a-z_0-9]+)+(?![\w/])", words):
            is_file = name.endswith(
                (".py", ".md", ".json", ".jsonl", ".npz", ".yaml", ".txt", ".png", ".tar", ".safetensors")
            )
            assert name.split(".")[0] not in sections or is_file or name in known, name


def test_contributing_lists_every_folder_in_one_line() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    folders = {"configs", "scripts_bash", "tests", "docs", "data/embedded"}
    for package in PACKAGES:
        for folder, _, files in os.walk(ROOT / package):
            if any(file.endswith(".py") for file in files):
                folders.add(str(Path(folder).relative_to(ROOT)))
    listed = Counter(re.findall(r"^\| `([\w/]+)/` \| \S.* \|$", text, re.MULTILINE))
    assert listed == Counter(folders)


def test_the_readme_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    for page in PAGES[1:]:
        assert f"]({page_name(page)})" in text, page


def test_the_paper_is_cited_as_in_citation_cff() -> None:
    bibtex = dict(fences(ROOT / "README.md"))["bibtex"]
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    assert re.findall(r"title += \{(.*)\}", bibtex) == [paper["title"]]
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    assert re.findall(r"author += \{(.*)\}", bibtex) == [authors]
    assert re.findall(r"arXiv:[\d.]+", bibtex) == [paper["identifiers"][0]["value"]]


def test_the_readme_says_whether_a_gpu_was_measured() -> None:
    measured = any(page.parent.name == "benchmarks" for page in PAGES)
    assert ("no GPU figure exists yet" in (ROOT / "README.md").read_text()) != measured


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent == ROOT / "docs"], ids=page_name)
def test_a_page_begins_with_a_command(page: Path) -> None:
    lines = page.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert "```bash" in lines[:6]


def test_no_sentence_appears_twice() -> None:
    sentences = Counter()
    for page in PAGES:
        if page.parent.name == "benchmarks" or page.name == "config.md":  # of each device; generated from help texts
            continue
        text = re.sub(r"\]\(\S+\)", "]", prose(page))  # without targets of links
        text = re.sub(r"^\s*(\||- |#+ )|\|", "\n\n", text, flags=re.MULTILINE)
        for piece in re.split(r"(?<=[.;:])\s|\n\n", text):
            words = re.findall(r"\w+", piece.lower())
            sentences[" ".join(words)] += len(words) >= 6
    assert [sentence for sentence, count in sentences.items() if count > 1] == []


def test_overrides_in_tables_load() -> None:
    """Keys with values, as in the paper's ablations."""
    rows = [
        words.split() for page in PAGES for words in in_backticks(page) if re.fullmatch(r"([a-z_.]+=\S+ ?)+", words)
    ]
    known = [row for row in rows if all(argument.partition("=")[0] in keys_of(Config) for argument in row)]
    assert len(known) >= 10
    for row in known:
        load_config(["experiment.output_dir=unused", *row])


def test_the_quick_start_in_the_readme_is_the_one_that_was_kept() -> None:
    report = (ROOT / "docs/results/quickstart/report.txt").read_text()
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| quick start[^|]*\|([^|]*)\| measured here", readme, re.MULTILINE)
    numbers = [number for row in rows for number in re.findall(r"\d+\.\d+", row)]
    assert len(numbers) == 12
    assert [number for number in numbers if number not in report] == []
