"""What must hold for the tree as a whole: no unsafe deserialisation, no machine's paths, documents that are true."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.core.policies import PARTS, POLICIES
from shared.profile_files import SHIPPED, list_profiles

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("shared", "services", "planner", "loadgen")
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def project_files() -> list[Path]:
    """What git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    return [ROOT / name for name in listed.decode().split("\0") if name and (ROOT / name).is_file()]


def python_files() -> list[Path]:
    files = [path for path in project_files() if path.suffix == ".py"]
    assert len(files) > 50
    return files


def imported_modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def unsafe_calls(tree: ast.AST) -> Iterator[int]:
    """Lines of torch.load without weights_only=True, numpy's allow_pickle, yaml.load, eval and exec."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        keywords = {
            keyword.arg: keyword.value.value for keyword in node.keywords if isinstance(keyword.value, ast.Constant)
        }
        match ast.unparse(node.func):
            case "torch.load":
                unsafe = keywords.get("weights_only") is not True
            case "eval" | "exec" | "yaml.load" | "os.system":
                unsafe = True
            case _:
                unsafe = keywords.get("allow_pickle") is True or keywords.get("shell") is True
        if unsafe:
            yield node.lineno


def test_nothing_deserialises_code() -> None:
    found = []
    for path in python_files():
        tree = ast.parse(path.read_text())
        found += [
            f"{path.relative_to(ROOT)}: import {module}"
            for module in imported_modules(tree)
            if module.partition(".")[0] in UNSAFE_MODULES
        ]
        found += [f"{path.relative_to(ROOT)}:{line}" for line in unsafe_calls(tree)]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "eval(x)",
        "run(c, shell=True)",
    ],
)
def test_the_check_sees_what_it_looks_for(code: str) -> None:
    assert list(unsafe_calls(ast.parse(code))) == [1]


def test_the_check_lets_safe_calls_through() -> None:
    safe = "torch.load(f, weights_only=True); np.load(f); model.eval(); run(c)"
    assert list(unsafe_calls(ast.parse(safe))) == []


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    folders = "|".join(("home", "root", "Users", "work", "opt"))
    pattern = re.compile(rf"(?<![\w.$~-])/(?:{folders})/[\w.]")
    found = []
    for path in project_files():
        if path.suffix in {".png", ".jsonl", ".bin"}:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert found == []


def test_the_packages_are_this_trees_and_all_are_installed() -> None:
    """PyPI has packages of these names too: an environment with one of them must not be used."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert config["tool"]["setuptools"]["packages"]["find"]["include"] == [f"{name}*" for name in PACKAGES]
    for name in PACKAGES:
        module = importlib.import_module(name)
        assert module.__file__ is not None
        assert Path(module.__file__).parent == ROOT / name


def test_every_package_folder_has_an_init() -> None:
    """setuptools' find would leave a folder without one out of the wheel."""
    folders = {path.parent for path in python_files() if path.relative_to(ROOT).parts[0] in PACKAGES}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_no_init_in_the_tests() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_console_scripts_exist() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for target in config["project"]["scripts"].values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_every_make_target_that_a_document_names_exists() -> None:
    targets = makefile_targets()
    for document in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "CHANGELOG.md"):
        named = set(re.findall(r"(?:^\$ |`)make ([a-z][a-z-]*)", document.read_text(), re.MULTILINE))
        assert named <= targets, document
    assert {"setup", "demo", "test", "check", "bench", "bench-scheduling", "test-compose"} <= targets


def test_the_readmes_two_commands_come_first() -> None:
    commands = re.findall(r"^\$ (.+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [command.split("#")[0].strip() for command in commands[:2]] == ["make demo", "make test"]


def test_every_local_link_of_a_document_leads_somewhere() -> None:
    missing = []
    for document in (path for path in project_files() if path.suffix == ".md"):
        targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text())
        missing += [
            f"{document.relative_to(ROOT)}: {target}"
            for target in targets
            if "://" not in target and not (document.parent / target).exists()
        ]
    assert missing == []


def test_every_script_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"`python (benchmarks/\S+\.py)", (ROOT / "README.md").read_text()))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_scheduling_document_names_every_policy_and_every_part() -> None:
    text = (ROOT / "docs" / "scheduling.md").read_text()
    assert re.findall(r"^\*\*`(\w+)`\*\* ", text, re.MULTILINE) == list(POLICIES)
    assert re.findall(r"^\| `(\w+)` \| [^|]+ \|$", text, re.MULTILINE) == list(PARTS)


def test_the_scheduling_document_has_every_parameter_with_its_default() -> None:
    """Of `adaptive`; of `remote` and `threshold` the document says where they differ."""
    text = (ROOT / "docs" / "scheduling.md").read_text()
    documented = dict(re.findall(r"^\| `([\w.]+)` \| ([\w.]+) \| [^|]+ \|$", text, re.MULTILINE))
    parts = {*(flag for changes in PARTS.values() for flag in changes), "routing.by_deadline", "name", "route"}
    defaults = {path: value for path, value in flatten(POLICIES["adaptive"]) if path not in parts or path in documented}
    assert documented == {path: str(value).lower() for path, value in defaults.items()}


def flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for one in dataclasses.fields(node):
        value = getattr(node, one.name)
        if dataclasses.is_dataclass(value):
            yield from flatten(value, f"{prefix}{one.name}.")
        else:
            yield f"{prefix}{one.name}", value


def test_every_profile_ships_with_the_package() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = config["tool"]["setuptools"]["package-data"]["shared"]
    shipped = {path for pattern in patterns for path in (ROOT / "shared").glob(pattern)}
    assert {path for path in SHIPPED.iterdir() if path.is_file()} == shipped
    assert {"h100-qwen3-32b", "cpu-smollm2"} <= set(list_profiles())
