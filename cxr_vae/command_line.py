"""What the commands of this project have in common: help that shows defaults, mistakes told in one sentence."""

import argparse
import errno
import os
import socket
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import Any

from cxr_vae.errors import UserError

Command = Callable[[argparse.Namespace], int]

OVERRIDES_HELP = "options by their dotted key, such as train.epochs=2 (`cxr-vae config` lists them all)"


OTHERS_WAIT_S = 3.0


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses arguments, among which options and `key=value` may come in any order.

    argparse alone takes `key=value` only where they follow one another.
    """
    arguments, rest = parser.parse_known_args(argv)
    late = [word for word in rest if "=" in word and not word.startswith("-")]
    unknown = [word for word in rest if word not in late]
    if unknown or (late and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or late)}")
    if late:
        arguments.overrides = [*arguments.overrides, *late]
    return arguments


def run(command: Command, arguments: argparse.Namespace, program: str) -> int:
    """Calls a command and turns what a user can mend into one sentence on stderr."""
    try:
        return command(arguments)
    except UserError as error:
        message = str(error)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a lost mount, no permission: the machine's state, not a bug
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if error.filename is None and not full:
            raise
        message = f"{error.filename or 'writing'}: {error.strerror}"
        if full:
            message += "; what is finished is kept: make room and run the same command again"
    except KeyboardInterrupt:
        message = "interrupted; the same command goes on from where it was"
    if rank() > 0:
        # What befell every rank is told by the first, and torchrun or Slurm ends the others before this time is over.
        time.sleep(OTHERS_WAIT_S)
        program = f"rank {rank()} on {socket.gethostname()}: {program}"
    print(f"{program}: error: {message}", file=sys.stderr, flush=True)
    return 2


def rank() -> int:
    """This process's rank under torchrun."""
    return int(os.environ.get("RANK", 0))


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except the None that means "not given"; doesn't tear file names and options at their hyphens."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def add_command(commands: Any, name: str, command: Command, text: str, example: str) -> argparse.ArgumentParser:
    """A command whose help shows its defaults and an example."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text.partition(".")[0], description=text, epilog=f"example: {example}", formatter_class=_Help
    )
    parser.set_defaults(command=command)
    return parser


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """The `key=value` arguments."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
