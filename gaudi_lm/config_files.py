"""Configuration files: flags in JSON or YAML, read before torch is imported."""

from __future__ import annotations

import json
import re
from pathlib import Path

from gaudi_lm.errors import UserError

ENDINGS = (".json", ".yaml", ".yml")
# PyYAML takes a number with an exponent for text, unless it has both a point and a sign.
_EXPONENT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
# Words of a list that argparse would take for flags, and what they begin with until the values are read.
_DASHED = re.compile(r"-(?!\d|\.\d|inf|nan)", re.IGNORECASE)
VALUE = "\0"


class _Float(float):
    """A number as JSON has it, which a flag that is text needs: a revision may be 1.10."""

    text: str

    def __new__(cls, text: str):
        number = super().__new__(cls, text)
        number.text = text
        return number


def read_config_file(path: str) -> dict[str, str | list | dict | None]:
    """Flags from a JSON or YAML file: a mapping from flag name, without dashes, to value.

    Numbers, and words of a YAML file, stay as they are written, so that ``no`` can be a flag's choice and ``1.10`` a
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
    try:
        return _read_json(path, text) if file.suffix == ".json" else _read_yaml(path, text)
    except RecursionError:
        raise UserError(f"{path}: too many lists or mappings within one another") from None


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
        values = json.loads(text, object_pairs_hook=once, parse_float=_Float)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error
    if not isinstance(values, dict):
        raise _mapping_expected(path, type(values).__name__)
    return {
        name: [_written(item) for item in value] if isinstance(value, list) else _written(value)
        for name, value in values.items()
    }


def _written(value: object) -> str | dict | None:
    if isinstance(value, _Float):
        return value.text
    return value if value is None or isinstance(value, (str, dict)) else json.dumps(value)


def _read_yaml(path: str, text: str) -> dict:
    import yaml

    def value_of(node: yaml.Node) -> object:
        if isinstance(node, yaml.ScalarNode):
            return None if node.tag == "tag:yaml.org,2002:null" else node.value
        if isinstance(node, yaml.SequenceNode):
            return [value_of(item) for item in node.value]
        return _typed(loader.construct_object(node, deep=True))

    try:
        loader = yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        raise UserError(f"{path}, line {number}: not valid YAML: a character U+{error.character:04X}") from error
    try:
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            kind = {yaml.SequenceNode: "list", yaml.ScalarNode: "str"}.get(type(root), "NoneType")
            raise _mapping_expected(path, kind)
        _check_nodes(path, root, (), set())
        loader.flatten_mapping(root)
        return {name.value: value_of(value) for name, value in root.value}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from error
    finally:
        loader.dispose()


def _check_nodes(path: str, node, above: tuple, checked: set[int]) -> None:
    """Refuse keys that are no words or are given twice, and what contains itself, in a node of YAML and in all below.

    Args:
        above: the nodes that contain this one.
        checked: where the ids of nodes are kept that may be used again.
    """
    if node.id == "scalar" or id(node) in checked:
        return
    names = set()
    for item in node.value:
        key, value = item if node.id == "mapping" else (None, item)
        line = (key or value).start_mark.line + 1
        if value in (*above, node):
            raise UserError(f"{path}, line {line}: a {node.id} that contains itself")
        if key is not None:
            if key.id != "scalar":
                raise UserError(f"{path}, line {line}: a key is a word, this one is a {key.id}")
            if key.value in names:
                raise UserError(f"{path}, line {line}: {key.value} is given twice")
            if key.value != "<<":
                names.add(key.value)
        _check_nodes(path, value, (*above, node), checked)
    checked.add(id(node))


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
    values (with :data:`VALUE` before one that looks like a flag), mappings JSON text, and null leaves the flag at its
    default.
    """
    if not begins_with_file(argv):
        return list(argv)
    flags = []
    for name, value in read_config_file(argv[0]).items():
        flag = f"--{str(name).lstrip('-')}"
        if isinstance(value, list):
            words = [item if isinstance(item, str) else json.dumps(item) for item in value]
            flags += [flag, *(f"{VALUE}{word}" if _DASHED.match(word) else word for word in words)]
        elif value is not None:
            flags.append(f"{flag}={value if isinstance(value, str) else json.dumps(value)}")
    return flags + argv[1:]
