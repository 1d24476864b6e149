"""Imports run one way: scripts, training, modeling, data, arguments, device, errors; the launcher needs the last."""

import ast

import pytest
from running import ROOT

# From the bottom up: each may import those before it, and its own package.
LAYERS = ["errors", "interruptions", "config_files", "variables", "optimum_imports", "device", "host"]
LAYERS += ["architectures", "arguments", "data", "modeling", "training"]
LAUNCHER = {"errors", "variables", "config_files", "device", "host", "launcher"}
MODULES = sorted(path.relative_to(ROOT) for path in (ROOT / "gaudi_lm").rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    """The parts of gaudi_lm that a module imports, also inside of functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the package"
            parts = node.module.split(".")
            names = [alias.name for alias in node.names] if parts == ["gaudi_lm"] else parts[1:2]
            found.update(names if parts[0] == "gaudi_lm" else ())
        elif isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            found.update(part[1] for part in parts if part[0] == "gaudi_lm" and len(part) > 1)
    return found


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_import_points_upwards(path):
    own = path.parts[1].removesuffix(".py")
    if own == "__init__":
        allowed = set()
    elif own == "launcher":
        allowed = LAUNCHER
    else:
        allowed = set(LAYERS[: LAYERS.index(own) + 1])
    assert imported(ast.parse((ROOT / path).read_text())) <= allowed


def test_the_check_sees_imports():
    tree = ast.parse("import gaudi_lm.data.files\ndef f():\n    from gaudi_lm.training.trainer import LMTrainer")
    assert imported(tree) == {"data", "training"}
    assert imported(ast.parse("from gaudi_lm import device\nimport torch")) == {"device"}
