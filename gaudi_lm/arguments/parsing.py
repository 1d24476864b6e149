"""How flags are read: command line, configuration file, old names, abbreviations; and what each value may be."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from inspect import get_annotations

from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from gaudi_lm.arguments.model_files import check_model_folders
from gaudi_lm.arguments.ranges import check_ranges
from gaudi_lm.arguments.refusals import check_flags, check_folders
from gaudi_lm.config_files import VALUE, begins_with_file, expand_config_file, read_config_file, split_flag
from gaudi_lm.device import parse_bool
from gaudi_lm.errors import UserError, nearest, print_once, user_errors, warn

OLD_NAMES = {
    "--evaluation_strategy": "--eval_strategy",
    "--no_cuda": "--use_cpu",
    "--per_gpu_train_batch_size": "--per_device_train_batch_size",
    "--per_gpu_eval_batch_size": "--per_device_eval_batch_size",
    "--push_to_hub_token": "--hub_token",
    "--use_hpu_graphs": "--use_hpu_graphs_for_inference",
}
# Of inherited flags whose own help texts do not say what the suite does.
HELP = {
    "distribution_strategy": "How cards average gradients: `ddp` by DistributedDataParallel, `fast_ddp` all at once."
}
_NEGATIVE = re.compile(r"^-(\d|\.\d|inf|nan)", re.IGNORECASE)


class _Parser(HfArgumentParser):
    """HfArgumentParser whose errors are one line."""

    def error(self, message):
        print_once(f"error: {message}")
        sys.exit(2)


def whole_number(text: str) -> int:
    """A whole number, however it is written: ``2``, ``2.0``, ``1e3``."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not value.is_integer():  # infinities and NaN are not
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        return int(value)


def json_mapping(text: str) -> dict:
    """A mapping in JSON."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a mapping in JSON")
    return value


# argparse puts the name of the type into its message.
whole_number.__name__, json_mapping.__name__ = "whole number", "mapping in JSON"


def _reader(kind: Callable) -> Callable:
    if kind is string_to_bool:
        return parse_bool
    if kind is int:
        return whole_number
    return json_mapping if getattr(kind, "__origin__", kind) is dict else kind


class _Help(argparse.HelpFormatter):
    """Each flag once: the spellings with dashes and ``--no_...`` are taken, and not shown."""

    def _format_action_invocation(self, action):
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{action.option_strings[0]} {self._format_args(action, action.dest.upper())}"

    def _get_help_string(self, action):
        default = getattr(action.default, "value", action.default)
        if default in (None, argparse.SUPPRESS, "", [], {}) or "default" in action.help.lower():
            return action.help
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{action.help.rstrip()} (default: {shown.replace('%', '%%')})"


def build_parser(*dataclass_types: type) -> argparse.ArgumentParser:
    """A parser for these dataclasses whose errors are one line; ``--help`` has a group for each of them.

    Flags that only a library defines come last, under headings of their own.
    """
    parser = _Parser(dataclass_types, allow_abbrev=False, formatter_class=_Help, usage="%(prog)s [FILE] [FLAGS]")
    for action in parser._actions:
        action.type = _reader(action.type)
        if action.type is parse_bool and action.nargs is None:
            action.nargs, action.const = "?", True
        action.help = HELP.get(action.dest, action.help)
        if action.help:
            # argparse formats help texts with %, and some upstream texts hold bare percent signs.
            action.help = action.help.replace("%", "%%").replace("%%(", "%(").replace("%%%%", "%%")
    _group(parser, dataclass_types)
    return parser


def _group(parser: argparse.ArgumentParser, dataclass_types: tuple[type, ...]) -> None:
    """Put each flag under the subject of the class that defines it, those of libraries after all others.

    `HfArgumentParser` adds all flags to one group, and argparse has no public way to move them.
    """
    upstream = {field.name for field in fields(TrainingArguments)}
    headings: dict[str, str] = {}
    for kind in (base for whole in dataclass_types for base in reversed(whole.__mro__)):
        package = kind.__module__.partition(".")[0]
        if package not in ("builtins", "transformers", "optimum"):
            subject = kind.__name__.removesuffix("Arguments").removeprefix("LM").lower()
            heading = subject if package == "gaudi_lm" else "this script"
            headings |= dict.fromkeys(get_annotations(kind), heading)
    titles = [*dict.fromkeys(headings.values()), "Gaudi (optimum-habana)", "training (transformers)"]
    actions = [action for action in parser._actions if action.dest != "help"]
    for group in parser._action_groups:
        group._group_actions = [action for action in group._group_actions if action.dest == "help"]
    groups = {title: parser.add_argument_group(title) for title in titles}
    for action in actions:
        if action.nargs != 0:  # not --no_..., a second name of another flag
            title = headings.get(action.dest, titles[-1 if action.dest in upstream else -2])
            groups[title]._group_actions.append(action)


def _full_names(words: list[str], known: list[str]) -> list[str]:
    """Flags by their full names: dashes within a name, old names and unambiguous beginnings are taken."""
    full = []
    for word in words:
        plain, equals, value = split_flag(word)
        if not plain.startswith("--") or plain == "--":
            full.append(word)
            continue
        name = word.partition("=")[0]
        if plain in OLD_NAMES:
            warn(f"{name} is the old name of {OLD_NAMES[plain]}")
            plain = OLD_NAMES[plain]
        elif plain not in known:
            meant = [flag for flag in known if flag.startswith(plain)]
            if len(meant) > 1:
                raise UserError(f"{name} is the beginning of several flags: {', '.join(meant)}")
            if meant:
                warn(f"{name} is taken for {meant[0]}")
                plain = meant[0]
            else:
                plain = name
        full.append(f"{plain}{equals}{value}")
    return full


def _join_negative_values(words: list[str]) -> list[str]:
    """``--weight_decay -1e-5`` as one word: argparse takes such a number for a flag."""
    joined: list[str] = []
    for word in words:
        if _NEGATIVE.match(word) and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def parse(argv: list[str] | None, *dataclass_types: type) -> tuple:
    """Read flags, or a leading configuration file and flags that override it, into the dataclasses.

    Args:
        argv: flags without the program's name; by default those of the process.
        dataclass_types: in the order in which the values are wanted.

    Raises:
        UserError: an unknown or ambiguous flag or key (the nearest ones are named), or a value that cannot be.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    values = _checked.pop((*argv, *dataclass_types), None) or _read(argv, *dataclass_types)
    parts = tuple(
        kind(**{field.name: values[field.name] for field in fields(kind) if field.init}) for kind in dataclass_types
    )
    for part in parts:
        # For the manifest of a checkpoint: all flags of the script, without secrets.
        part.flags = {name: value for name, value in values.items() if not name.endswith("token")}
    return parts


# What `check_flags_of_script` has read, for `parse`: each warning is said once.
_checked: dict[tuple, dict[str, object]] = {}


def check_flags_of_script(name: str, *dataclass_types: type) -> None:
    """Read the flags of this process if ``name`` is ``__main__``: what is wrong ends it, before slow imports.

    Args:
        name: the ``__name__`` of the script.
        dataclass_types: as for :func:`parse`.
    """
    if name == "__main__":
        argv = sys.argv[1:]
        with user_errors():
            key = (*argv, *dataclass_types)
            _checked[key] = _read(argv, *dataclass_types)


def _check_encoding(words: list[str]) -> None:
    """Refuse what is not UTF-8, such as old file names: libraries in Rust and the model card cannot hold it."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError(f"{word!r} is not UTF-8: rename the file, or type it in UTF-8") from None


def _check_once(path: str, written: list[str], flags: list[str]) -> None:
    """Refuse two keys of a file that are the same flag: one with dashes, an old name, the beginning of a name."""
    first: dict[str, str] = {}
    for word, flag in zip(written, flags, strict=True):
        name, key = flag.partition("=")[0], word.partition("=")[0].removeprefix("--")
        if name.startswith("--") and first.setdefault(name, key) != key:
            raise UserError(f"{path}: {first[name]} and {key} are the same flag, {name}")


def _read(argv: list[str], *dataclass_types: type) -> dict[str, object]:
    parser = build_parser(*dataclass_types)
    # Of each action the first name: the others are the same with dashes.
    known = [action.option_strings[0] for action in parser._actions if action.option_strings[0] != "-h"]
    words = expand_config_file(argv)
    _check_encoding([*argv, *words])
    typed = argv[1:] if begins_with_file(argv) else argv
    in_file = _join_negative_values(words[: len(words) - len(typed)])
    flags = _full_names(in_file, known)
    _check_once(argv[0] if in_file else "", in_file, flags)
    flags += _full_names(_join_negative_values(typed), known)
    values, rest = parser.parse_known_args(flags)
    if rest:
        flag = rest[0].split("=")[0]
        of_file = begins_with_file(argv) and flag.removeprefix("--") in read_config_file(argv[0])
        what = "unknown flag" if flag.startswith("-") else "no flag takes the value"
        raise UserError(f"{f'{argv[0]}: ' if of_file else ''}{what} {flag}{nearest(flag, known)}")
    found = {
        name: [one.removeprefix(VALUE) if isinstance(one, str) else one for one in value]
        if isinstance(value, list)
        else value
        for name, value in vars(values).items()
    }
    check_ranges(found)
    check_model_folders(found)
    check_folders(found)
    check_flags(found, {name: parser.get_default(name) for name in found})
    return found
