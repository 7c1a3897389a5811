"""What a document holds: code blocks, commands, and whether these could be typed as they stand."""

import ast
import importlib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cxr_vae.config import Config
from cxr_vae.config_file import load_config, override_config

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "slurm").glob("*.md")),
]

OURS = r"(?:[A-Z_]+=\S* )?(cxr-vae|cxr-launch|torchrun|make|python benchmarks/|sbatch|pytest)\b"
"""What a command that is checked begins with."""

OTHERS = {
    *("ssh", "git", "pre-commit", "cd", "python3", ".venv/bin/pip", ".", "module"),
    *("sinfo", "sacctmgr", "squeue", "scancel", "scontrol", "slurm/local_cluster"),
}
"""Commands of others, which can't be checked here."""


class Block(NamedTuple):
    """A fenced code block."""

    language: str
    text: str


def fenced(text: str) -> list[Block]:
    """Code blocks between ```."""
    return [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]


def indented(text: str) -> list[str]:
    """Code blocks that are indented by four spaces."""
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"(?:^    .+\n?)+", rest, re.MULTILINE)


def commands(text: str) -> list[str]:
    """Lines of code blocks that call us, without comments."""
    shown = [*(block.text for block in fenced(text)), *indented(text)]
    lines = [line.partition(" #")[0].strip() for block in shown for line in block.splitlines()]
    return [line for line in lines if re.match(OURS, line)]


def strangers(text: str) -> list[str]:
    """Lines of indented blocks, which hold commands, that begin with no command we know."""
    lines = [line.strip() for block in indented(text) for line in block.splitlines()]
    return [line for line in lines if not re.match(OURS, line) and line.split()[0] not in OTHERS]


def sections(text: str) -> dict[str, str]:
    """By heading of the second level."""
    _, *parts = re.split(r"^## ", text, flags=re.MULTILINE)
    return {heading: body for heading, _, body in (part.partition("\n") for part in parts)}


def check_command(line: str) -> None:
    """Raises where a line could not be typed: for words nobody knows, missing files, options that don't fit."""
    words = shlex.split(line, comments=True)
    if re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program = words[0]
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all(word in targets or "=" in word for word in words[1:]), line
    elif program in ("python", "sbatch", "pytest"):
        files = [word for word in words[1:] if "/" in word and word.endswith((".py", ".sbatch"))]
        assert files, line
        assert all((ROOT / file).is_file() for file in files), line
        check_configs(words, [word for word in words if re.match(r"[\w.]+=", word)])
    elif program == "torchrun":
        assert words[words.index("cxr_vae") - 1] == "-m", line
        check_call("cxr-vae", words[words.index("cxr_vae") + 1 :])
    else:
        check_call(program, words[1:])


def check_call(program: str, words: list[str]) -> None:
    """The arguments of `cxr-vae` or `cxr-launch`: that they parse, and so do the configuration and the profile."""
    from cxr_vae.cli import build_parser as vae
    from cxr_vae.commands.command_line import parse
    from cxr_vae.config_file import PRIOR_OPTIONS
    from cxr_vae.evaluation.evaluate import MAY_OVERRIDE as OF_EVALUATION
    from cxr_vae.training.fit_prior import MAY_OVERRIDE as OF_PRIOR
    from launch.cli import build_parser as launcher
    from launch.profiles import load_profile
    from launch.sweeps import combinations, grid_of

    arguments = parse({"cxr-vae": vae, "cxr-launch": launcher}[program](), words)
    overrides = getattr(arguments, "overrides", [])
    allowed = {"prior": OF_PRIOR, "evaluate": OF_EVALUATION, "audit": OF_EVALUATION, "generate": PRIOR_OPTIONS}
    if words[0] == "sweep":
        for one in combinations(grid_of(overrides, arguments.grid)):
            check_configs(words, one)
    elif program == "cxr-vae" and words[0] in allowed:
        override_config(Config(), overrides, allowed[words[0]])
    else:
        check_configs(words, overrides)
    if getattr(arguments, "profile", None):
        load_profile(arguments.profile)


def check_configs(words: Sequence[str], overrides: Sequence[str]) -> None:
    """The configurations among the words load with the overrides."""
    for word in words:
        if word.startswith("configs/") and not word.startswith("configs/cluster/"):
            load_config(ROOT / word, overrides)


def check_python(text: str) -> None:
    """Python that could run as far as can be known: it parses, and what it imports of ours is there."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("cxr_vae", "launch")):
            for alias in node.names:
                assert hasattr(importlib.import_module(node.module or ""), alias.name), f"{node.module}.{alias.name}"


def write_block(block: Block, root: Path) -> None:
    """Does to the files below `root` what a block with a file's name in its first line says."""
    first, _, body = block.text.partition("\n")
    if block.language == "diff":
        for hunk in re.split(r"^@@ ", block.text, flags=re.MULTILINE)[1:]:
            head, _, lines = hunk.partition("\n")
            change(root / head.removesuffix(" @@"), lines.splitlines())
    elif first.startswith("# at the end of "):
        path = root / first.removeprefix("# at the end of ")
        path.write_text(f"{path.read_text()}\n\n{body}")
    else:
        path = root / first.removeprefix("# ")
        assert re.match(r"# [\w/]+\.\w+$", first), f"{first}: the block should name its file"
        assert not path.exists(), f"{path} is there already"
        path.write_text(body)


def change(path: Path, lines: Sequence[str]) -> None:
    """Lines of a diff without their numbers: what they take away and leave stands in the file, once."""
    before, after = ("".join(f"{line[1:]}\n" for line in lines if line[0] in kept) for kept in (" -", " +"))
    text = path.read_text()
    assert text.count(before) == 1, f"{path.name} does not hold, once:\n{before}"
    path.write_text(text.replace(before, after))
