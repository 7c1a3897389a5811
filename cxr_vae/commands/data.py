"""The commands that look at data and divide them: `cxr-vae inspect` and `split`."""

import argparse
from pathlib import Path
from typing import Any

from cxr_vae.commands.command_line import add_command, positive, seed


def add_split(commands: Any) -> None:
    """`cxr-vae split` among the commands."""
    parser = add_command(
        commands,
        "split",
        split,
        "Divides a folder of X-rays anew, by patient and class, and writes which image goes where as a small CSV for "
        "`cxr-vae shard --split-file`. The same options give the same file.",
        "cxr-vae split chest_xray --out split.csv --keep-test --drop-duplicates",
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder of X-rays; it is only read")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="new CSV file")
    parser.add_argument(
        "--fractions", default="train=0.8,val=0.1,test=0.1", metavar="SHARES", help="share of images of each split"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of what chance decides (default: 0)")
    parser.add_argument(
        "--drop-duplicates", action="store_true", help="of files with the same bytes keep one (default: all)"
    )
    parser.add_argument(
        "--keep-test",
        action="store_true",
        help="leave the folder's test split as it is, and divide the rest (default: divide it, too)",
    )


def split(arguments: argparse.Namespace) -> int:
    """`cxr-vae split`."""
    from cxr_vae.data.make_split import describe, divide, parse_fractions
    from cxr_vae.data.sources import scan
    from cxr_vae.data.split_file import write_split_file

    division = divide(
        scan(arguments.source, every_class=False),
        parse_fractions(arguments.fractions),
        arguments.seed,
        drop_duplicates=arguments.drop_duplicates,
        keep_test=arguments.keep_test,
    )
    write_split_file(arguments.out, division.images)
    print(f"{describe(division)}\n\n{arguments.out}")
    return 0


def add_inspect(commands: Any) -> None:
    """`cxr-vae inspect` among the commands."""
    parser = add_command(
        commands,
        "inspect",
        inspect,
        "Looks at finished shards: counts, sizes, duplicates, patients in several splits, borders. Writes what it "
        "finds into their folder, as inspection.json and a picture of the duplicates.",
        "cxr-vae inspect shards/kaggle_224 --source chest_xray",
    )
    parser.add_argument("shards", metavar="SHARDS", type=Path, help="folder that `cxr-vae shard` finished")
    parser.add_argument(
        "--source", type=Path, metavar="FOLDER", help="the folder they were made from, to see which were colour"
    )
    parser.add_argument("--workers", type=positive, help="threads (default: one a core)")


def inspect(arguments: argparse.Namespace) -> int:
    """`cxr-vae inspect`."""
    from cxr_vae.console import outlive_full_log_disk
    from cxr_vae.files import write_json
    from cxr_vae.inspection.inspect import RECORD, inspect_shards

    outlive_full_log_disk()
    text, record = inspect_shards(arguments.shards, arguments.source, arguments.workers)
    print(text)  # first: it can be read where the folder can't be written
    write_json(arguments.shards / RECORD, record)
    for name in (RECORD, *(found["file"] for found in record["pictures"])):
        print(f"\n{arguments.shards / name}", end="")
    print()
    return 0
