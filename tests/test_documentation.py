"""README and docs: short enough to read, links that lead somewhere, tables that say what is so."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from documentation import PAGES, README, REPOSITORY, headings, read_pages, without_code

WRITTEN = [*PAGES, REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "CHANGELOG.md"]
# What the suite stands on.
PACKAGES = [
    "optimum-habana",
    "transformers",
    "datasets",
    "evaluate",
    "accelerate",
    "deepspeed",
    "peft",
    "torch",
    "habana-torch-plugin",
]


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 350


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_lines_are_short_outside_tables(page: Path):
    lines = enumerate(page.read_text().splitlines(), 1)
    assert [number for number, line in lines if len(line) > 120 and not line.startswith("|")] == []


def test_every_page_is_reached_from_readme():
    linked = {target for target in re.findall(r"\]\(([^)#]+)", README.read_text()) if target.startswith("docs/")}
    assert linked == {f"docs/{page.name}" for page in PAGES if page != README}


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_links_resolve(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        assert not anchor or anchor in headings(without_code(linked.read_text())), target


def test_headings_of_a_page_differ():
    for page in WRITTEN:
        found = headings(without_code(page.read_text()))
        assert page.name == "CHANGELOG.md" or len(found) == len(set(found)), page


def test_install_table_and_requirements_say_where_each_package_comes_from():
    _, _, rest = README.read_text().partition("\n## Install\n")
    chapter, _, _ = rest.partition("\n## ")
    rows = [line.split("|") for line in chapter.splitlines() if line.startswith("| `")]
    described = {name: row for row in rows for name in re.findall(r"`([\w-]+)`", row[1])}
    requirements = (REPOSITORY / "requirements.txt").read_text()
    for package in PACKAGES:
        assert all(cell.strip() for cell in described[package][2:4]), package
        assert re.search(rf"(?<![\w-]){package}(?![\w-])", requirements), package
    # A package that pip would install on a Gaudi host is a line; one that Intel's image brings must not be.
    lines = {match[0] for line in requirements.splitlines() if (match := re.match(r"[\w-]+", line))}
    assert {name for name in PACKAGES if "SynapseAI" in described[name][2]} & lines == set()
    assert {name for name in PACKAGES if described[name][2].startswith(" pip: ")} <= lines


def test_benchmark_tables_are_those_of_the_results():
    """docs/benchmarks.md and README hold what ``python -m benchmarks --table`` would write."""
    script = (
        "from benchmarks.__main__ import BENCHMARKS; from benchmarks.tables import *; "
        "price = read_result('price')['figures']; "
        "tables = results_table(list(BENCHMARKS)), gains_table(), price_table(price), short_price_table(price); "
        "print('@'.join(tables), end='')"
    )
    made = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    page = REPOSITORY / "docs" / "benchmarks.md"
    places = [("benchmarks", page), ("gains", README), ("price", page), ("price", README)]
    for (mark, file), table in zip(places, made.stdout.split("@"), strict=True):
        assert table.count("\n") > 3
        assert f"<!-- {mark}: begin -->\n{table}<!-- {mark}: end -->" in file.read_text()


def test_words_are_those_of_the_field():
    assert re.findall(r"\bdata sets?\b|\bset aside\b|\bengines?\b|\bgo(?:es)? on from\b", read_pages()) == []


def test_map_of_contributing_names_what_is_there():
    rows = [
        line.split("|")[1] for line in (REPOSITORY / "CONTRIBUTING.md").read_text().splitlines() if line[:3] == "| `"
    ]
    named = re.findall(r"`([^`]+)`", "".join(rows))
    assert [path for path in named if not (REPOSITORY / path).exists()] == []
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True).stdout.split()
    folders = {f"{path.split('/')[0]}/" for path in tracked if "/" in path and not path.startswith(".")}
    assert folders <= set(named)
