"""What decides a result, as a hash: the values a function takes, and the code that it runs.

``datasets`` finds a cached result by a hash of pickles. A function of an importable module is pickled by its name, so
that a prompt could be edited and the old rows come back; and a fast tokenizer pickles otherwise after its first use.
Here a function counts with its bytecode, with what it has closed over, and with all functions and constants that it
reaches in code that is not an installed library; of a library its version counts.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import hashlib
import importlib.util
import json
import pickle
import sys
import sysconfig
import tempfile
import types
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
import transformers
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
# Where a tokenizer came from, and settings of it that no row depends on.
INCIDENTAL = ("name_or_path", "model_max_length", "padding_side", "truncation_side")


def fingerprint(*values: object) -> str:
    """32 hexadecimal digits that are the same in every process for values and functions that do the same."""
    walk = _Walk()
    walk.visit((sys.version_info[:2], values))
    return walk.digest.hexdigest()[:32]


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> list:
    """Everything that decides what a tokenizer returns, including how it renders conversations."""
    versions = [tokenizers.__version__, transformers.__version__, jinja2.__version__]
    shared = [type(tokenizer), versions, str(tokenizer.chat_template), repr(tokenizer.special_tokens_map_extended)]
    shared.append(getattr(tokenizer, "split_special_tokens", False))
    if getattr(tokenizer, "is_fast", False):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["truncation"] = state["padding"] = None
        return [*shared, json.dumps(state, sort_keys=True)]
    settings = {
        name: repr(value)
        for name, value in sorted(tokenizer.init_kwargs.items())
        if name not in INCIDENTAL and not name.endswith("_file")
    }
    added = sorted((token, repr(value)) for token, value in tokenizer.added_tokens_decoder.items())
    with tempfile.TemporaryDirectory() as folder:
        files = tokenizer.save_vocabulary(folder)  # merges and scores, which get_vocab() does not tell
        contents = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files if file]
    return [*shared, settings, added, sorted(tokenizer.get_vocab().items()), contents]


def _is_own(module_name: str | None) -> bool:
    """Whether a module is code that people change: of this package or a user's, not of an installed library."""
    if not module_name or module_name.partition(".")[0] in ("gaudi_lm", "__main__"):
        return True
    module = sys.modules.get(module_name)
    if module_name in sys.builtin_module_names or module is None:
        return module is None
    return _is_own_file(getattr(module, "__file__", None))


def _is_own_file(file: str | None) -> bool:
    if not file or file.startswith(LIBRARIES):
        return False
    return not {"site-packages", "dist-packages"} & {*Path(file).parts}


@functools.cache
def _instructions(code: types.CodeType) -> list[tuple[str, Any]]:
    """Operations of a function and what they are about: a run asks several times about the same functions."""
    return [(instruction.opname, instruction.argval) for instruction in dis.get_instructions(code)]


class _Walk:
    def __init__(self):
        self.digest = hashlib.sha256()
        # By id: their number and the values, which are held so that no id is used twice.
        self.seen: dict[int, tuple[int, object]] = {}

    def note(self, *words: object) -> None:
        self.digest.update("\0".join(map(str, words)).encode("utf-8", "surrogatepass") + b"\1")

    def visit(self, value: object) -> None:
        if _is_own(type(value).__module__):
            self.visit(type(value))  # whose methods decide what becomes of a text or a tuple, too
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, type(...))):
            self.note(type(value).__name__, repr(value))
            return
        # Equal constants are one object or several, depending on how a module was compiled.
        if not isinstance(value, (tuple, frozenset)):
            if id(value) in self.seen:
                self.note("again", self.seen[id(value)][0])
                return
            self.seen[id(value)] = len(self.seen), value
        self.note(type(value).__qualname__)
        if isinstance(value, (list, tuple)):
            self.note(len(value))
            for item in value:
                self.visit(item)
        elif isinstance(value, (set, frozenset)):
            self.note(*sorted(fingerprint(item) for item in value))
        elif isinstance(value, dict):
            self.visit([*value.items()])
        elif isinstance(value, functools.partial):
            self.visit((value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            self.visit((value.__func__, value.__self__))
        elif isinstance(value, property):
            self.visit((value.fget, value.fset))
        elif isinstance(value, (functools.cached_property, functools.partialmethod)):
            self.visit(vars(value))
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif hasattr(value, "__wrapped__"):  # a decorated function, or a static or class method
            self.visit(value.__wrapped__)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, types.ModuleType):
            self._named(value.__name__, "")
        elif isinstance(value, PreTrainedTokenizerBase):
            self.visit(tokenizer_state(value))
        elif isinstance(value, Dataset):
            self.note(value._fingerprint)
        elif _is_own(type(value).__module__) and hasattr(value, "__dict__"):
            self.visit(vars(value))
        else:
            self._named(type(value).__module__, type(value).__qualname__)
            # What cannot be pickled, such as a lock or an open file, is nothing that rows could be made of.
            with contextlib.suppress(Exception):
                self.digest.update(pickle.dumps(value, protocol=4))

    def _named(self, module: str, name: str) -> None:
        library = sys.modules.get(module.partition(".")[0])
        self.note(module, name, getattr(library, "__version__", ""))

    def _function(self, function: types.FunctionType) -> None:
        if not _is_own(function.__module__):
            self._named(function.__module__, function.__qualname__)
            return
        self.visit((function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # a name that has no value yet
                self.visit(cell.cell_contents)
        self._code(function.__code__, function.__globals__)

    def _class(self, cls: type) -> None:
        if not _is_own(cls.__module__):
            self._named(cls.__module__, cls.__qualname__)
            return
        self.note(cls.__qualname__)
        self.visit(cls.__bases__)
        for name, member in vars(cls).items():
            if not (name.startswith("__") and not isinstance(member, types.FunctionType)):
                self.note(name)
                self.visit(member)

    def _code(self, code: types.CodeType, namespace: dict) -> None:
        self.note(code.co_code.hex(), code.co_argcount, code.co_kwonlyargcount, code.co_flags, *code.co_names)
        self.note(*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])  # which a caller may give by name
        self.note(getattr(code, "co_exceptiontable", b"").hex())  # alone tells Python 3.12 what is within a try
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant, namespace)
            else:
                self.visit(constant)
        module = None  # of which the next instruction takes an attribute
        for operation, name in _instructions(code):
            if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
                found = namespace.get(name)
            elif operation in ("LOAD_ATTR", "LOAD_METHOD") and module is not None:
                found = getattr(module, name, None)
            else:
                found = None
                if operation == "IMPORT_NAME":
                    self._imported(name, namespace.get("__package__"))
            module = found if isinstance(found, types.ModuleType) and _is_own(found.__name__) else None
            if found is not None:
                self.visit(found)

    def _imported(self, name: str, package: str | None) -> None:
        """A module that a function itself imports counts with its whole source, imported yet or not."""
        spec = None
        for candidate in (name, f"{package}.{name}" if package else name):
            with contextlib.suppress(ImportError, ValueError):
                spec = spec or importlib.util.find_spec(candidate)
        if spec is not None and spec.origin and spec.has_location and _is_own_file(spec.origin):
            self.note(hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest())
        else:
            self._named(name, "")
