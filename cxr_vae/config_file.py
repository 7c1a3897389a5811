"""Configurations as text: defaults ← a YAML file ← `dotted.key=value`, refused in words where they are wrong.

Nothing here is lenient: an unknown key, a wrong type or an impossible value is refused before anything starts, with
the nearest valid name. Types and limits are pydantic's; the file format is YAML 1.2's core schema, in which `1e-3` is a
number and `off` is a word (PyYAML's own YAML 1.1 reads them the other way round).
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from cxr_vae.config import MAY_CHANGE, OPTIONS, SECTIONS, Config, Section
from cxr_vae.errors import UserError

SectionT = TypeVar("SectionT", bound=Section)


class _Core(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's core schema, refusing a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(problem=f"{twice} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


class _CoreDumper(yaml.SafeDumper):
    """Quotes what `_Core` would read as something else than a word."""


for _class in (_Core, _CoreDumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in [  # https://yaml.org/spec/1.2.2/#103-core-schema
        ("null", r"null|Null|NULL|~|", "nN~"),
        ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
        ("int", r"[-+]?[0-9]+", "-+0123456789"),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
        ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ]:
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), [*_first, *([""] if _tag == "null" else [])]
        )


# PyYAML would read 010 as octal, as YAML 1.1 does.
_Core.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


SHIPPED = Path(__file__).with_name("configs")
"""The configurations that come with the package; in a checkout a link to the folder at its top."""

SAMPLING = ("num_steps", "guidance", "autoguidance")
"""Of the prior's options, what is settled when images are drawn, not when it is fitted."""

PRIOR_OPTIONS = ("prior.name", *(f"prior.{name}" for name in SAMPLING))
"""What is drawn from, and how: later stages of a run may set these."""


def config_path(path: Path) -> Path:
    """`path`; where that isn't there and names one that comes with the package, as configs/demo.yaml does, that one."""
    ours = SHIPPED.joinpath(*path.parts[1:])
    return ours if path.parts[:1] == ("configs",) and not path.is_file() and ours.is_file() else path


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Defaults ← the YAML file at `path` ← overrides such as `train.epochs=2`.

    An override may leave out the section where the last part of the key is unique: `lr=1e-4`, `features=random`.
    Raises UserError for anything that is not a valid configuration.
    """
    tree = _read(Path(path)) if path is not None else {}
    origin = {key: str(path) for key, _ in flat(tree)}
    for key in origin:
        if key not in OPTIONS:
            raise UserError(f"{path}: {_unknown(key)}")
    return _validate(tree, origin, overrides, str(path) if path is not None else "the options")


def override_config(config: Config, overrides: Sequence[str], allowed: Sequence[str]) -> Config:
    """`config` with overrides of the keys or sections in `allowed` only: what a later stage of a run may still set."""
    for override in overrides:
        key, _ = _parse(override, allowed)
        if not _is_among(key, allowed):
            raise UserError(
                f"option {override}: {key} was settled by the training run; here {', '.join(allowed)} can be set"
            )
    return _validate(config.model_dump(), {}, overrides, "the options", allowed)


def load_section(kind: type[SectionT], path: Path) -> SectionT:
    """A YAML file of the options of one section, such as a launcher's; refused in words as a configuration is."""
    tree = read_tree(path)
    for key in tree:
        if key not in kind.model_fields:
            near = difflib.get_close_matches(str(key), kind.model_fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(kind.model_fields)}"
            raise UserError(f"{path}: unknown option {key}: {hint}")
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError("; ".join(_sentence(one, {}, str(path)) for one in error.errors())) from None


def load_values(path: Path) -> dict[str, list[str]]:
    """A YAML file of lists of values by key, each value as the text of an override."""
    values = {}
    for key, listed in read_tree(path).items():
        if not isinstance(listed, list) or not listed:
            raise UserError(f"{path}: {key} should hold a list of values, such as [1e-3, 1e-4], not {listed!r}")
        values[str(key)] = [
            yaml.dump(value, Dumper=_CoreDumper, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
            for value in listed
        ]
    return values


def _parse(override: str, allowed: Sequence[str] = ()) -> tuple[str, Any]:
    """The full key and the value of `key=value`; the value is YAML: numbers, true/false, null, [lists] and words."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r} is not an option: write key=value, as in train.epochs=2")
    try:
        return _full_key(key, allowed), yaml.load(text, _Core)
    except yaml.YAMLError:
        raise UserError(f"option {override}: the value is not valid YAML; quote it if it is a text") from None


def read_tree(path: Path) -> dict[str, Any]:
    """What a YAML file holds, whatever its keys are; UserError where it isn't one."""
    try:
        tree = yaml.load(config_path(path).read_text(encoding="utf-8"), _Core)
    except OSError as error:
        raise UserError(f"{path}: cannot read this configuration ({error.strerror}); name a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not a valid YAML file: {reason}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected keys such as `train:`, found a {type(tree).__name__}")
    return tree


def _read(path: Path) -> dict[str, Any]:
    tree = read_tree(path)
    for section in SECTIONS:
        if section in tree and tree[section] is None:
            del tree[section]  # a section all of whose keys are commented out
        elif section in tree and not isinstance(tree[section], dict):
            raise UserError(f"{path}: {section} should hold keys such as {_keys_of(section)[0]}, not {tree[section]!r}")
    return tree


def flat(tree: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a configuration's sections."""
    for name, value in tree.items():
        key = f"{above}{name}"
        if isinstance(value, dict) and key not in OPTIONS and (value or key in SECTIONS):
            yield from flat(value, f"{key}.")
        else:
            yield key, value


def _keys_of(section: str) -> list[str]:
    return [key for key in OPTIONS if key.startswith(section + ".")]


def _full_key(key: str, allowed: Sequence[str] = ()) -> str:
    """The dotted key that `key` stands for: itself, or the only one that ends in it.

    Where there are several, only those count that are among the keys or sections in `allowed`.
    """
    if key in OPTIONS:
        return key
    ends = [option for option in _that_end_in(key, all_of_them=True) if _is_among(option, allowed)] or _that_end_in(key)
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise UserError(f"{key} is ambiguous: write {' or '.join(ends)}")
    raise UserError(_unknown(key))


def _that_end_in(name: str, *, all_of_them: bool = False) -> list[str]:
    """The options whose last part is `name`; those of the prior, which has its own command, only where no other is."""
    ends = [option for option in OPTIONS if option.endswith("." + name)]
    return ends if all_of_them else [option for option in ends if not option.startswith("prior.")] or ends


def _is_among(key: str, allowed: Sequence[str]) -> bool:
    """Whether it is one of these keys, or in one of these sections."""
    return key in allowed or key.partition(".")[0] in allowed


def _unknown(key: str) -> str:
    if key in SECTIONS:
        return f"{key} is a section, not an option; its keys are {', '.join(_keys_of(key))}"
    name = key.rpartition(".")[2]
    near = _that_end_in(name)
    near = near or difflib.get_close_matches(key, OPTIONS, n=1, cutoff=0.6)
    near = near or [
        option for option in OPTIONS if difflib.get_close_matches(name, [option.rpartition(".")[2]], n=1, cutoff=0.6)
    ]
    hint = f"did you mean {' or '.join(near[:3])}?" if near else "`cxr-vae config` lists them all"
    return f"unknown option {key}: {hint}"


def _validate(
    tree: dict[str, Any],
    origin: dict[str, str],
    overrides: Sequence[str],
    fallback: str,
    allowed: Sequence[str] = (),
) -> Config:
    for override in overrides:
        key, value = _parse(override, allowed)
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
        origin[key] = f"option {override}"
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError("; ".join(_sentence(one, origin, fallback) for one in error.errors())) from None


def _sentence(error: Any, origin: Mapping[str, str], fallback: str) -> str:
    """What pydantic found, in words: `configs/x.yaml: train.epochs=-1 should be greater than or equal to 1`."""
    key = ".".join(str(part) for part in error["loc"][:2] if not str(part).startswith("function-"))
    place = "".join(f"[{part}]" for part in error["loc"][2:] if isinstance(part, int))
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if message.startswith("Input "):
        message = f"{key}{place}={error['input']!r} {message.removeprefix('Input ')}"
    return f"{origin.get(key, fallback)}: {message}"


def dump_config(config: Config) -> str:
    """The whole configuration as YAML, which `load_config` reads back to an equal one."""
    return yaml.dump(config.model_dump(), Dumper=_CoreDumper, sort_keys=False, default_flow_style=None)


def describe_config(config: Config) -> str:
    """The configuration with each option's meaning beside it."""
    lines: list[str] = []
    values = dict(flat(config.model_dump()))
    for key, field in OPTIONS.items():
        section, _, name = key.rpartition(".")
        if section and not any(line == f"{section}:" for line in lines):
            lines += ["", f"# {SECTIONS[section].__doc__}".rstrip("."), f"{section}:"]
        text = yaml.dump(values[key], Dumper=_CoreDumper, default_flow_style=True).strip().removesuffix("\n...")
        choices = [str(choice) for choice in get_args(field.annotation) if isinstance(choice, str)]
        meaning = (" | ".join(choices) + "; " if choices else "") + (field.description or "")
        lines.append(f"{'  ' if section else ''}{name}: {text}".ljust(42) + f"  # {meaning}")
    return "\n".join(lines)


def differences(old: Config, new: Config) -> list[str]:
    """What `new` changes of `old` that a resumed run may not change, as `key: old → new`."""
    before, after = (dict(flat(config.model_dump())) for config in (old, new))
    changed = [
        f"{key}: {before[key]!r} → {after[key]!r}"
        for key in OPTIONS
        if before[key] != after[key] and not _may_change(key)
    ]
    if old.train.epochs != new.train.epochs and new.optimizer.schedule == "cosine":
        changed.append(f"train.epochs: {old.train.epochs} → {new.train.epochs} (the cosine schedule depends on it)")
    return changed


def _may_change(key: str) -> bool:
    """Whether the option or its whole section is marked MAY_CHANGE."""
    fields = (OPTIONS[key], Config.model_fields[key.partition(".")[0]])
    return any(field.json_schema_extra == MAY_CHANGE for field in fields)
