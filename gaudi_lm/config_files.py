"""Configuration files: flags in JSON or YAML, read before torch is imported."""

from __future__ import annotations

import json
import re
from pathlib import Path

from gaudi_lm.errors import UserError

ENDINGS = (".json", ".yaml", ".yml")
# PyYAML takes a number with an exponent for text, unless it has both a point and a sign.
_EXPONENT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


def read_config_file(path: str) -> dict[str, str | list | dict | None]:
    """Flags from a JSON or YAML file: a mapping from flag name, without dashes, to value.

    Numbers and words of a YAML file stay as they are written, so that ``no`` can be a flag's choice and ``1.10`` a
    revision; what stands within a mapping is typed. A byte-order mark is skipped.

    Raises:
        UserError: the file is missing, cannot be parsed, is not a mapping, or names a flag twice.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such configuration file")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8") from error
    return _read_json(path, text) if file.suffix == ".json" else _read_yaml(path, text)


def _mapping_expected(path: str, kind: str) -> UserError:
    return UserError(f"{path}: a configuration file maps flag names to values; this one holds a {kind}")


def _read_json(path: str, text: str) -> dict:
    def once(pairs: list[tuple]) -> dict:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{path}: {name} is given twice")
        return dict(pairs)

    try:
        values = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error
    if not isinstance(values, dict):
        raise _mapping_expected(path, type(values).__name__)
    return {
        name: [_written(item) for item in value] if isinstance(value, list) else _written(value)
        for name, value in values.items()
    }


def _written(value: object) -> str | dict | None:
    return value if value is None or isinstance(value, (str, dict)) else json.dumps(value)


def _read_yaml(path: str, text: str) -> dict:
    import yaml

    loader = yaml.SafeLoader(text)

    def value_of(node: yaml.Node) -> object:
        if isinstance(node, yaml.ScalarNode):
            return None if node.tag == "tag:yaml.org,2002:null" else node.value
        if isinstance(node, yaml.SequenceNode):
            return [value_of(item) for item in node.value]
        return _typed(loader.construct_object(node, deep=True))

    try:
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            kind = {yaml.SequenceNode: "list", yaml.ScalarNode: "str"}.get(type(root), "NoneType")
            raise _mapping_expected(path, kind)
        names = set()
        for name, _ in root.value:
            if name.value in names:
                raise UserError(f"{path}, line {name.start_mark.line + 1}: {name.value} is given twice")
            if name.value != "<<":
                names.add(name.value)
        loader.flatten_mapping(root)
        return {name.value: value_of(value) for name, value in root.value}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from error
    finally:
        loader.dispose()


def _typed(value: object) -> object:
    """Numbers with an exponent as numbers, dates as text, all through a mapping."""
    if isinstance(value, dict):
        return {str(name): _typed(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_typed(item) for item in value]
    if isinstance(value, str):
        return float(value) if _EXPONENT.match(value) else value
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def split_flag(word: str) -> tuple[str, str, str]:
    """``--some-flag=value`` as ``("--some_flag", "=", "value")``; a word that is no flag as it is, in the first."""
    if not word.startswith("--"):
        return word, "", ""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}", equals, value


def begins_with_file(argv: list[str]) -> bool:
    """Whether the first word of a command line is a configuration file, and not a flag."""
    return bool(argv) and argv[0].endswith(ENDINGS) and not argv[0].startswith("-")


def expand_config_file(argv: list[str]) -> list[str]:
    """Replace a leading configuration file by the flags it stands for, so that flags after it override it.

    ``["run.yaml", "--seed", "1"]`` becomes ``["--learning_rate=0.001", ..., "--seed", "1"]``. Lists become several
    values, mappings JSON text, and null leaves the flag at its default.
    """
    if not begins_with_file(argv):
        return list(argv)
    flags = []
    for name, value in read_config_file(argv[0]).items():
        flag = f"--{str(name).lstrip('-')}"
        if isinstance(value, list):
            flags += [flag, *(item if isinstance(item, str) else json.dumps(item) for item in value)]
        elif value is not None:
            flags.append(f"{flag}={value if isinstance(value, str) else json.dumps(value)}")
    return flags + argv[1:]
