"""docs/extending.md and docs/slurm.md are true of a copy of this checkout with extending.md's changes."""

import filecmp
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT, commands, fenced, sections, strangers, write_block
from tests.helpers import HANG_S, TINY, environment

EXTENDING, SLURM = ((ROOT / "docs" / name).read_text() for name in ("extending.md", "slurm.md"))
SECTIONS = sections(EXTENDING)
ADDED = {
    "train": (*TINY, "epochs=1"),
    "shard": ("--image-size=32",),
    "prior": ("prior.epochs=2",),
    "evaluate": ("num_generated=20",),
}
"""To what is typed, so that it takes seconds."""


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory, source: Path, shards: Path, trained: Path) -> Path:
    """The checkout after all changes of extending.md, with what `make demo` leaves there, only smaller."""
    root = tmp_path_factory.mktemp("extended")
    for name in ("cxr_vae", "launch", "tests", "benchmarks", "configs", "slurm", "docs"):
        # The last is whoever follows slurm.md's own, which extending.md writes here.
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "my_site.yaml"))
    for name in ("pyproject.toml", "Makefile"):
        shutil.copy(ROOT / name, root)
    for block in fenced(EXTENDING):
        if block.language in ("python", "diff", "yaml"):
            write_block(block, root)
    demo = root / "demo" / "phantoms"
    for made, name in ((source, "images"), (shards, "shards"), (trained, "run")):
        shutil.copytree(made, demo / name)
    for number, path in enumerate(sorted((demo / "images").glob("*/PNEUMONIA/*"))):
        if number % 2:  # the tests' images are all of bacteria
            path.rename(path.with_name(path.name.replace("bacteria", "virus")))
    return root


def call(root: Path, *words: str) -> str:
    """Runs Python on words there; what it prints."""
    command, there = [sys.executable, *words], environment(PYTHONPATH=str(root))
    result = subprocess.run(command, cwd=root, env=there, capture_output=True, text=True, check=False, timeout=HANG_S)
    assert result.returncode == 0, (words, result.stdout, result.stderr)
    return result.stdout


def of_section(heading: str, program: str) -> list[list[str]]:
    """The words of its commands of a program, without variables before."""
    lines = [re.sub(r"^[A-Z_]+=\S* ", "", line) for line in commands(SECTIONS[heading])]
    return [shlex.split(line)[1:] for line in lines if line.startswith(f"{program} ")]


def headings(program: str) -> list[str]:
    """Of sections that have such commands."""
    return [heading for heading in SECTIONS if of_section(heading, program)]


@pytest.mark.parametrize("heading", headings("pytest"))
def test_the_tests_that_a_section_names_hold(heading: str, extended: Path) -> None:
    for words in of_section(heading, "pytest"):
        assert " passed" in call(extended, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words)


@pytest.mark.parametrize("heading", headings("cxr-vae"))
def test_what_a_section_types_works(heading: str, extended: Path) -> None:
    for block in fenced(SECTIONS[heading]):
        if block.language == "bash":
            subprocess.run(["bash", "-euc", block.text], cwd=extended, check=True)
    for words in of_section(heading, "cxr-vae"):
        call(extended, "-m", "cxr_vae", *words, *ADDED.get(words[0], ()))
        if heading == "A feature network":
            results = (extended / words[1] / "evaluation/evaluation_results.json").read_text()
            assert "frechet_fields" in results
            assert '"fid"' not in results


def test_the_charbonnier_term_is_added_to_the_loss(extended: Path) -> None:
    """Of two images of four pixels, with a mean image of 0.5: one is 0.5, the other black."""
    code = """if True:
        import torch
        from cxr_vae.config import ObjectiveConfig
        from cxr_vae.losses.elbo import Output
        from cxr_vae.losses.objective import objective

        images = torch.tensor([0.5, 0.0])[:, None, None, None].expand(2, 1, 2, 2)
        output = Output(torch.zeros(2, 1, 2, 2), torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(()))
        (reconstruction, kl), loss = objective(output, images, ObjectiveConfig(charbonnier_weight=3.0), 0.5)
        print(*reconstruction.tolist(), *kl.tolist(), *loss.tolist())
    """
    found = [float(word) for word in call(extended, "-c", code).split()]
    plain = 4 * math.log(2)  # of Bernoulli pixels with p = 1/2, whatever the image
    away = 4 * (math.sqrt(0.25 + 1e-6) - 1e-3)
    assert found == pytest.approx([plain, plain, 1.5, 1.5, plain + 0.75, plain + 0.75 + 3 * away], rel=1e-6)


def test_what_was_changed_is_clean(extended: Path) -> None:
    ruff = Path(sys.executable).parent / "ruff"
    there = [path.relative_to(extended) for path in extended.rglob("*.py")]
    same = [path for path in there if (ROOT / path).is_file() and filecmp.cmp(ROOT / path, extended / path, False)]
    changed = sorted(set(there) - set(same))
    assert len(changed) >= 9
    for words in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        done = subprocess.run([ruff, *words, *changed], cwd=extended, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
    assert " passed" in call(extended, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_layers.py")


def test_every_command_of_both_pages_could_be_typed(extended: Path) -> None:
    lines = commands(EXTENDING) + commands(SLURM)
    code = "import sys\nfrom tests.documents import check_command\nfor line in sys.argv[1:]: check_command(line)"
    call(extended, "-c", code, *lines)
    assert strangers(EXTENDING) == strangers(SLURM) == []


def dry_run(root: Path, words: list[str]) -> str:
    """What `cxr-launch` prints there."""
    assert "--dry-run" in words
    return call(root, "-c", "from launch.cli import main; raise SystemExit(main())", *words)


@pytest.mark.parametrize(
    "line", [line for line in commands(EXTENDING) if line.endswith("--dry-run")], ids=lambda line: line.split()[1]
)
def test_a_profile_gives_the_script_that_is_stated(line: str, extended: Path) -> None:
    printed = dry_run(extended, shlex.split(line)[1:])
    assert "#SBATCH --gres=gpu:a100:4\n" in printed
    assert "\nmodule load CUDA/12.6\n" in printed


def test_what_a_dry_run_is_shown_to_print_it_prints(extended: Path) -> None:
    shown = [block.text for block in fenced(SLURM) if block.text.startswith("$ ")]
    assert shown
    for text in shown:
        command, _, expected = text.partition("\n")
        rest = dry_run(extended, shlex.split(command)[2:])
        for part in filter(None, expected.split("…\n")):
            assert part in rest, part
            rest = rest.partition(part)[2]
