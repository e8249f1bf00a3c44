"""The rooms of ``fastrl`` and the order of their imports, read from the sources: type-only and local ones count."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.helpers.rooms import LEVELS

REPO = Path(__file__).resolve().parent.parent
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
LOOSE = 6  # modules beside the folders


def sources(package: Path) -> dict[str, Path]:
    """Module name → file, of a package and all below it."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: Mapping[str, Path]) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file, wherever it stands; of names in a package, the package."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}" if f"{module}.{alias.name}" in known else module


def faults(package: Path) -> list[str]:
    """Imports against the order, as ``file:line: room -> room``."""
    known = sources(package)
    found = []
    for name, path in known.items():
        room = room_of(name)
        for line, module in imports(name, path, known):
            other = room_of(module) if module.partition(".")[0] == package.name else None
            if other is None or other == room or room is None:
                continue
            if LEVEL[other] >= LEVEL[room]:
                found.append(f"{path.relative_to(package.parent)}:{line}: {room} -> {other}")
    return found


def room_of(module: str) -> str | None:
    """The folder or loose module at the top that a module lies in; None: the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other."""

    def reach(start: str) -> set[str]:
        seen, todo = set[str](), [start]
        while todo:
            for after in graph.get(todo.pop(), set()) - seen:
                seen.add(after)
                todo.append(after)
        return seen

    reached = {node: reach(node) for node in graph}
    rings = {tuple(sorted(o for o in graph if o in reached[n] and n in reached[o])) for n in graph if n in reached[n]}
    return [list(ring) for ring in sorted(rings)]


def test_imports_point_down() -> None:
    assert faults(REPO / "fastrl") == []


def test_every_room_has_its_level() -> None:
    rooms = {room_of(name) for name in sources(REPO / "fastrl")} - {None}
    assert rooms - {"recipes"} == set(LEVEL)


def test_no_room_is_in_a_circle() -> None:
    known = sources(REPO / "fastrl")
    rooms: dict[str, set[str]] = {room: set() for room in LEVEL}
    modules: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for _, module in imports(name, path, known):
            other = room_of(module) if module in known else None
            modules[name] |= {module} & known.keys() - {name}
            room = room_of(name)
            if room is not None and other is not None and other != room:
                rooms[room].add(other)
    assert circles(rooms) == []
    assert [ring for ring in circles(modules) if len({room_of(name) for name in ring}) > 1] == []


def test_the_tests_mirror_the_tree() -> None:
    """Folder by folder; what several share is in ``tests/helpers``, never in another test's file."""
    for package in ("fastrl", "kernels"):
        here, source = REPO / "tests" / package, REPO / package
        source = source / "fastrl_kernels" if package == "kernels" else source
        folders = {path.parent.relative_to(here) for path in here.rglob("test_*.py")}
        assert [folder for folder in folders if not (source / folder).is_dir()] == []
        assert {path.parent.relative_to(source) for path in source.rglob("*.py")} - folders == set()
    tests = [path for package in ("fastrl", "kernels") for path in (REPO / "tests" / package).rglob("*.py")]
    assert [path for path in tests if not path.name.startswith("test_") and path.name != "conftest.py"] == []
    shared = [
        f"{path.relative_to(REPO)}:{line}"
        for path in (REPO / "tests").rglob("*.py")
        for line, module in imports(".".join(path.relative_to(REPO).with_suffix("").parts), path, {})
        if module.startswith("tests.") and any(part.startswith("test_") for part in module.split("."))
    ]
    assert shared == []


def test_few_modules_lie_outside_a_room() -> None:
    loose = [path.stem for path in (REPO / "fastrl").glob("*.py") if path.name != "__init__.py"]
    assert len(loose) <= LOOSE, loose


def test_the_kernels_know_nothing_of_the_trainer() -> None:
    known = sources(REPO / "kernels" / "fastrl_kernels")
    upward = [
        f"{path.name}:{line}"
        for name, path in known.items()
        for line, module in imports(name, path, known)
        if module.partition(".")[0] == "fastrl"
    ]
    assert upward == []


@pytest.mark.parametrize(
    ("room", "text", "message"),
    [
        ("answers", "def f():\n    import fastrl.data\n", "answers -> data"),
        ("data", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fastrl.rewards import x\n", "rewards"),
        ("captions", "from fastrl import data\n", "captions -> data"),
        ("plan", "from ..run import checkpoint\n", "plan -> run"),
        ("config", "import fastrl.config\nimport fastrl.http\nfrom fastrl_kernels import x\n", ""),
    ],
)
def test_the_reader_sees_local_type_only_and_relative_imports(
    tmp_path: Path, room: str, text: str, message: str
) -> None:
    for name in ("answers", "data", "rewards", "run", "config", room):
        (tmp_path / "fastrl" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "fastrl" / name / "__init__.py").write_text("")
    (tmp_path / "fastrl" / "__init__.py").write_text("")
    (tmp_path / "fastrl" / room / "some.py").write_text(text)
    found = faults(tmp_path / "fastrl")
    assert len(found) == bool(message)
    assert message in "".join(found)


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [["a", "b", "c"]]


@pytest.mark.parametrize(
    ("former", "now", "name"),
    [
        ("fastrl.optimizers", "fastrl.engine.optimizers", "AdamW8bit"),
        ("fastrl.pictures", "fastrl.data.pictures", "open_picture"),
        ("fastrl.models.varlen", "fastrl_kernels.varlen", "choose"),
    ],
)
@pytest.mark.parametrize(
    "statement",
    [
        "from {former} import {name} as found",
        "import {former}\nfound = {former}.{name}",
        "from {parent} import {module}\nfound = {module}.{name}",
    ],
)
def test_a_path_that_the_docs_showed_still_imports(statement: str, former: str, now: str, name: str) -> None:
    parent, _, module = former.rpartition(".")
    code = statement.format(former=former, name=name, parent=parent, module=module)
    code += f"\nimport {now}\nassert found is {now}.{name}\nassert {now}.__spec__.name == '{now}'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "statement",
    [
        "import fastrl",
        "import fastrl, inspect\ninspect.getmodule(inspect.stack()[0][0])",
        "import fastrl.config",
        "import fastrl.cli.main",
        "--help",
    ],
)
def test_torch_is_not_imported(statement: str) -> None:
    code = f"{statement}\nimport sys\nassert 'torch' not in sys.modules"
    if statement == "--help":
        code = (
            "import sys\nfrom fastrl.cli.main import main\nsys.argv = ['fastrl', '--help']\n"
            "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\nassert 'torch' not in sys.modules"
        )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=False)
    assert done.returncode == 0, done.stderr
