"""Which names of `habana_frameworks` and `torch.ops.hpu` installed packages use, by their syntax trees."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

ROOTS = ("habana_frameworks", "intel_transformer_engine")
PACKAGES = ("accelerate", "deepspeed", "optimum.habana", "peft", "torch", "transformers")


def used_names() -> dict[str, set[str]]:
    """By name, such as `habana_frameworks.torch.core.mark_step`: the files that use it."""
    found: dict[str, set[str]] = {}
    for package in PACKAGES:
        # Not `find_spec("optimum.habana")`, which would import `optimum`.
        top = Path(importlib.util.find_spec(package.partition(".")[0]).submodule_search_locations[0])
        folder = top.joinpath(*package.split(".")[1:])
        trees, inherited = {}, dict[str, str]()
        for path in sorted(folder.rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if any(word in text for word in (*ROOTS, "torch.hpu", "ops.hpu", "self.ht.")):
                trees[path] = ast.parse(text)
                # What a class has put into an attribute, its subclasses in other files find there.
                inherited |= {name: whole for name, whole in _aliases(trees[path]).items() if name.startswith("self.")}
        for path, tree in trees.items():
            for name in names_in(tree, inherited):
                found.setdefault(name, set()).add(str(path.relative_to(top.parent)))
    return found


def names_in(tree: ast.Module, inherited: dict[str, str] | None = None) -> set[str]:
    """Names that a module imports, and attributes of what it imported, also by way of `self.x = imported`.

    Args:
        inherited: such `self.x` of other modules, and what each is.
    """
    aliases = {"torch.hpu": "habana_frameworks.torch.hpu", "torch.ops.hpu": "torch.ops.hpu", **(inherited or {})}
    aliases.update(zip(ROOTS, ROOTS, strict=True))
    found = _imported(tree, aliases)
    return found | set(_attributes(tree, aliases))


def _aliases(tree: ast.Module) -> dict[str, str]:
    aliases = dict(zip(ROOTS, ROOTS, strict=True))
    _imported(tree, aliases)
    return aliases


def _imported(tree: ast.Module, aliases: dict[str, str]) -> set[str]:
    """Names that a module imports; what it calls them joins ``aliases``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.startswith(ROOTS):
                    found.add(name.name)
                    if name.asname:
                        aliases[name.asname] = name.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(ROOTS):
            for name in node.names:
                aliases[name.asname or name.name] = f"{node.module}.{name.name}"
                found.add(f"{node.module}.{name.name}")
        elif isinstance(node, ast.Call):
            texts = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            if (
                len(texts) == 2
                and all(isinstance(text, str) for text in texts)
                and texts[0].startswith(tuple(f"{root}." for root in ROOTS))
            ):
                found.add(".".join(texts))  # Kernel("habana_frameworks.torch.hpex.normalization", "FusedRMSNorm")
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            for target in node.targets:
                if isinstance(target, ast.Attribute):
                    aliases[f"{ast.unparse(target.value)}.{target.attr}"] = aliases[node.value.id]
    # A method may take for itself what another one has put into an attribute.
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute):
            source = aliases.get(ast.unparse(node.value))
            for target in node.targets:
                if source and isinstance(target, ast.Name):
                    aliases.setdefault(target.id, source)
    return found


def _attributes(tree: ast.Module, aliases: dict[str, str]) -> Iterator[str]:
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    inner = {id(node.value) for node in names if _parts(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner and isinstance(node.ctx, ast.Load):
            parts = _parts(node)
            for length in range(len(parts) - 1, 0, -1):
                whole = aliases.get(".".join(parts[:length]))
                if whole:
                    yield ".".join((whole, *parts[length:]))
                    break


def _parts(node: ast.expr) -> list[str]:
    """["a", "b", "c"] of `a.b.c`; nothing where a call or an index is part of it."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else []
