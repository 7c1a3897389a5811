"""What the documents say exists, exists; their commands parse."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "slurm").glob("*.md"))]


def blocks(path: Path) -> list[str]:
    """Code blocks, fenced or indented by four spaces."""
    text = path.read_text()
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return fenced + re.findall(r"(?:^    .+\n?)+", text, re.MULTILINE)


def commands(path: Path) -> list[str]:
    """Lines of code blocks that call us, without comments."""
    lines = [line.partition(" #")[0].strip() for block in blocks(path) for line in block.splitlines()]
    return [line for line in lines if re.match(r"(cxr-vae|cxr-launch|torchrun|make|python benchmarks/|sbatch)\b", line)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_parse_and_their_files_exist(path: Path) -> None:
    from cxr_vae.cli import build_parser as vae
    from cxr_vae.command_line import parse
    from cxr_vae.config_file import load_config
    from launch.cli import build_parser as launcher

    for line in commands(path):
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert all(word in targets or "=" in word for word in words[1:]), line
            continue
        if words[0] in ("python", "sbatch"):
            scripts = [word for word in words[1:] if "/" in word and word.endswith((".py", ".sbatch"))]
            assert scripts, line
            assert all((ROOT / script).is_file() for script in scripts), line
            continue
        program = words[0]
        if program == "torchrun":
            assert words[words.index("cxr_vae") - 1] == "-m", line
            words = words[words.index("cxr_vae") :]
            program = "cxr-vae"
        arguments = parse({"cxr-vae": vae, "cxr-launch": launcher}[program](), words[1:])
        for word in words:
            if word.startswith("configs/"):
                load_config(ROOT / word, [o for o in getattr(arguments, "overrides", ()) if "evaluate" not in words])


def test_readme_names_every_file_at_the_top() -> None:
    text = (ROOT / "README.md").read_text()
    for name in ("cxr_vae", "launch", "slurm", "configs", "tests", "benchmarks", "docs"):
        assert f"`{name}/" in text, name


def test_the_two_commands_come_first() -> None:
    assert commands(ROOT / "README.md")[:2] == ["make demo", "make test"]
