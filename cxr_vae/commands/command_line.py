"""What the commands of this project have in common: help that shows defaults, mistakes told in one sentence."""

import argparse
import contextlib
import errno
import json
import os
import signal
import socket
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cxr_vae.errors import LostPeersError, UserError

Command = Callable[[argparse.Namespace], int]

OVERRIDES_HELP = "options by their dotted key, such as train.epochs=2 (`cxr-vae config` lists them all)"


OTHERS_WAIT_S = 6.0


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
    """Calls a command, and tells what a user can mend in one sentence on stderr. Returns the exit code.

    One of several processes doesn't return from an error but ends at once: others may be waiting for it, and leaving
    their process group in order would wait for them.
    """
    code, message = 2, None
    try:
        ended = command(arguments)
        print(end="", flush=True)  # here, where a reader that has gone is no error, nor no stdout at all
        return ended
    except UserError as error:
        message = str(error)
    except LostPeersError as error:
        code, message = 1, str(error)
        time.sleep(OTHERS_WAIT_S)  # the one that failed should be heard first; whoever started us may end us meanwhile
    except BrokenPipeError:  # `| head` has seen enough
        _drop_what_can_not_be_printed()
        code = 128 + signal.SIGPIPE
    except OSError as error:  # a full disk, a lost mount, no permission: the machine's state, not a bug
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if error.filename is not None or full:
            message = f"{error.filename or 'writing'}: {error.strerror}"
        if full:
            _drop_what_can_not_be_printed()
            message = f"{message}; what is finished is kept: make room and run the same command again"
        if message is None:
            code = _bug(error)
    except KeyboardInterrupt:
        code, message = 128 + signal.SIGINT, "interrupted; the same command goes on from where it was"
    except Exception as error:
        code = _bug(error)
    if message is not None:
        _tell(message, program, lost=code == 1)
    if num_ranks() > 1:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    return code


def _bug(error: Exception) -> int:
    """Lets a single process fail as Python does; prints the traceback of one of several and returns its exit code."""
    if num_ranks() == 1:
        raise error
    text = f"rank {rank()} on {socket.gethostname()}:\n{traceback.format_exc()}"
    print(text, file=sys.stderr, flush=True)
    _tell_torchrun(text)
    return 1


def _drop_what_can_not_be_printed() -> None:
    """The interpreter's end would fail to flush it, say so, and exit with 120."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _tell(message: str, program: str, *, lost: bool) -> None:
    if rank() > 0:
        # What befell every rank is told by the first, and torchrun or Slurm ends the others before this time is over.
        time.sleep(OTHERS_WAIT_S)
        program = f"rank {rank()} on {socket.gethostname()}: {program}"
    text = f"{program}: error: {message}"
    print(text, file=sys.stderr, flush=True)
    if not lost:
        _tell_torchrun(text)


def _tell_torchrun(message: str) -> None:
    """Leaves the error where torchrun looks for it, so that its summary, the last on the screen, ends with it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))


def rank() -> int:
    """This process's rank under torchrun."""
    return int(os.environ.get("RANK", 0))


def num_ranks() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1))


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


def share(text: str) -> float:
    """`1%` or `0.01` as 0.01."""
    value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= value <= 1:
        raise ValueError(text)
    return value


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def deviation(text: str) -> float:
    """A finite number above 0."""
    if not 0 < float(text) < float("inf"):
        raise ValueError(text)
    return float(text)


def seed(text: str) -> int:
    """A whole number of at least 0."""
    if int(text) < 0:
        raise ValueError(text)
    return int(text)
