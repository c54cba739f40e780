"""What is public, and what importing it costs."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.resources
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import anyagent

PUBLIC_MODULES = [
    "anyagent",
    "anyagent.batch",
    "anyagent.cli",
    "anyagent.config",
    "anyagent.dialects",
    "anyagent.dialects.native",
    "anyagent.dialects.single",
    "anyagent.errors",
    "anyagent.im",
    "anyagent.om",
    "anyagent.otel",
    "anyagent.ray",
    "anyagent.testing",
    "anyagent.testing.faults",
    "anyagent.testing.pytest_plugin",
]


def modules() -> list[str]:
    found = pkgutil.walk_packages(anyagent.__path__, "anyagent.")
    return ["anyagent", *(module.name for module in found)]


def test_only_the_documented_modules_are_public() -> None:
    public = [name for name in modules() if not any(part.startswith("_") for part in name.split("."))]
    assert sorted(public) == PUBLIC_MODULES


@pytest.mark.parametrize("name", [name for name in modules() if name != "anyagent.__main__"])
def test_every_module_lists_its_names_and_has_them(name: str) -> None:
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        assert not public.startswith("_")
        getattr(module, public)


@pytest.mark.parametrize(
    "name", [name for name in PUBLIC_MODULES if name != "anyagent.testing.pytest_plugin"]
)
def test_everything_public_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for public in module.__all__:
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"{name}.{public}"
        if inspect.isclass(value):
            for attribute, member in vars(value).items():
                if not attribute.startswith("_") and (
                    inspect.isfunction(member) or isinstance(member, property)
                ):
                    inherited = any(hasattr(base, attribute) for base in inspect.getmro(value)[1:])
                    assert member.__doc__ or inherited, f"{name}.{public}.{attribute}"


def test_no_layer_imports_from_above() -> None:
    layers = [
        ["errors", "im", "om", "config", "_stats", "_log", "_observation"],
        ["_target", "dialects"],
        ["_transports"],
        ["_lanes", "_request", "_failure"],
        ["_writer", "_dispatcher"],
        ["_session"],
        ["_establish", "_supervisor"],
        ["_response"],
        ["_agent"],
        ["_open"],
        ["_pool", "otel", "batch"],
        ["ray"],
        ["testing", "cli", "__main__", "__init__"],
    ]
    rank = {name: number for number, names in enumerate(layers) for name in names}
    package = Path(anyagent.__file__).parent
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        own = rank[parts[0]]
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.level or _only_for_types(node, path):
                continue
            depth = len(parts) - node.level
            if depth == 0:
                names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
                assert all(rank[name] <= own for name in names), f"{path}: {names}"


def _only_for_types(wanted: ast.ImportFrom, path: Path) -> bool:
    return any(
        isinstance(node, ast.If)
        and ast.unparse(node.test) == "TYPE_CHECKING"
        and wanted.lineno in range(node.lineno, (node.end_lineno or 0) + 1)
        for node in ast.walk(ast.parse(path.read_text()))
    )


def test_importing_the_package_imports_no_backend() -> None:
    program = (
        "import sys, anyagent; "
        "print(*[name for name in sys.modules if name.split('.')[0] in "
        "('trio', 'trio_websocket', 'wsproto', 'websockets', 'asyncio', 'pytest', 'typer', 'rich')"
        " or name.startswith(('anyagent._transports.', 'anyagent.testing'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == []


def test_each_backend_imports_its_own_transport_only() -> None:
    program = (
        "import sys, {0}, anyagent; "
        "from anyagent.testing import memory_agent\n"
        "async def main():\n"
        "    async with memory_agent(): pass\n"
        "{0}.run({1})\n"
        "print(*sorted(name for name in sys.modules if name.startswith('anyagent._transports.')), end=' ')"
    )
    for backend, call in (("trio", "main"), ("asyncio", "main()")):
        command = [sys.executable, "-c", program.format(backend, call)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        loaded = done.stdout.split()
        assert f"anyagent._transports.{backend}" in loaded
        assert not {"trio", "asyncio"} - {backend} & {name.split(".")[-1] for name in loaded}


def test_the_core_needs_four_libraries() -> None:
    requirements = importlib.metadata.requires("anyagent") or []
    core = {re.split(r"[^\w-]", each)[0] for each in requirements if "extra ==" not in each}
    assert core == {"anyio", "msgspec", "trio-websocket", "websockets"}


def test_the_package_is_typed() -> None:
    assert importlib.resources.files("anyagent").joinpath("py.typed").is_file()
