"""What the documents say exists, exists; their commands parse. Two are tried by tests/test_extending.py."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

import cxr_vae
from tests.documents import DOCUMENTS, ROOT, check_command, check_python, commands, fenced

AFTER_CHANGES = ("extending.md", "slurm.md")
"""Their commands are those of a checkout with the changes that extending.md describes."""


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target, heading in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", path.read_text()):
        if not target.startswith(("http://", "https://")):
            there = path.parent / target if target else path
            assert there.exists(), f"{path.name} links to {target}"
            if heading:
                headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
                anchors = [re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings]
                assert heading in anchors, f"{path.name} links to {target}#{heading}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_parse_and_their_files_exist(path: Path) -> None:
    for line in commands(path.read_text()) if path.name not in AFTER_CHANGES else ():
        check_command(line)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_and_shell_blocks_parse(path: Path) -> None:
    for language, text in fenced(path.read_text()):
        if language == "python" and path.name not in AFTER_CHANGES:
            check_python(text)
        elif language == "bash":
            assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0, text


def test_readme_names_every_file_at_the_top() -> None:
    text = (ROOT / "README.md").read_text()
    for name in ("cxr_vae", "launch", "slurm", "configs", "tests", "benchmarks", "docs"):
        assert f"`{name}/" in text, name


def test_the_two_commands_come_first() -> None:
    assert commands((ROOT / "README.md").read_text())[:2] == ["make demo", "make test"]


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == cxr_vae.__version__
    assert citation["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
