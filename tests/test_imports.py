"""Imports run down only: one ordered list of packages, the lowest first."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path

import pytest

import vit_explain_callback
from vit_explain_callback.methods.names import METHODS

PACKAGE = Path(vit_explain_callback.__file__).parent
# What stands on one line may import one another; everything else imports only what stands above it here.
ORDER: list[set[str]] = [
    {"system"},
    {"isolation", "options"},
    {"vit"},
    {"metrics"},
    {"methods", "visualization"},
    {"explanation", "adapters"},
    {"_explain_batch"},
    {"explainer"},
    {"_explain"},
    {"tracking"},
    {"page"},
    {"tracker"},
    {"lightning", "cli"},
    {"__init__", "__main__"},
]
AT_ROOT = 9  # with the marker `py.typed`
LIGHTNING = ("lightning", "lightning_utilities", "pytorch_lightning")


def imported(source: str) -> set[str]:
    """Names of the modules that a source file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def height(room: str) -> int:
    return next(height for height, rooms in enumerate(ORDER) if room in rooms)


def upward_imports(room: str, source: str) -> set[str]:
    """What of the package a file of `room`, a package or a module at the root, imports from above or beside it."""
    own = {name.split(".")[1] for name in imported(source) if name.startswith("vit_explain_callback.")}
    return {name for name in own - {room} if height(name) >= height(room)}


def sources() -> list[tuple[str, Path]]:
    return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in sorted(PACKAGE.rglob("*.py"))]


def test_every_room_has_its_place_and_imports_only_downward() -> None:
    assert {room for room, _ in sources()} == set().union(*ORDER)
    upward = {str(path): upward_imports(room, path.read_text(encoding="utf-8")) for room, path in sources()}
    assert {path: names for path, names in upward.items() if names} == {}


def test_only_the_callback_knows_lightning() -> None:
    for room, path in sources():
        names = imported(path.read_text(encoding="utf-8"))
        uses = any(name.split(".")[0] in LIGHTNING for name in names)
        assert not uses or room == "lightning", path


def test_packages_are_one_level_deep_and_few_files_lie_beside_them() -> None:
    assert max(len(path.relative_to(PACKAGE).parts) for _, path in sources()) == 2
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= AT_ROOT


def test_the_check_can_fail() -> None:
    assert upward_imports("vit", "def f():\n    from vit_explain_callback.methods.base import x") == {"methods"}
    assert upward_imports("methods", "import vit_explain_callback.visualization.overlay") == {"visualization"}
    assert upward_imports("cli", "from vit_explain_callback.lightning.callback import x") == {"lightning"}
    assert upward_imports("lightning", "from vit_explain_callback.methods.attention_rollout import x") == set()


@pytest.mark.parametrize("room", ["", ".methods", ".metrics", ".tracking", ".visualization"])
def test_exported_names_are_sorted_and_importable(room: str) -> None:
    package = import_module(f"vit_explain_callback{room}")
    assert sorted(set(package.__all__)) == package.__all__
    assert all(hasattr(package, name) for name in package.__all__)
    assert not any(inspect.ismodule(getattr(package, name)) for name in package.__all__)
    assert set(package.__all__) <= set(dir(package))


def test_a_method_is_listed_once() -> None:
    methods = import_module("vit_explain_callback.methods")
    assert set(methods.BUILT_IN) <= set(methods.__all__) <= set(vit_explain_callback.__all__)
    assert set(methods.BUILT_IN) == {method.__name__ for method in METHODS.values()}


def test_the_version_is_that_of_the_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    written = re.search(r'^version = "(.*)"$', (PACKAGE.parent / "pyproject.toml").read_text(), re.MULTILINE)
    assert written is not None
    assert vit_explain_callback.__version__ == written[1]

    def is_not_installed(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", is_not_installed)
    assert vit_explain_callback.__version__ == "0+unknown"


def loaded_by(statement: str) -> set[str]:
    """Names of the packages that a fresh Python loads for a statement."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_what_is_imported_loads_no_more_than_it_needs() -> None:
    heavy = {"torch", "lightning", "pytorch_lightning", "matplotlib"}
    assert loaded_by("import vit_explain_callback; vit_explain_callback.__version__") & heavy == set()
    unused = {"lightning", "pytorch_lightning", "torchmetrics"}
    assert loaded_by("from vit_explain_callback import explain") & unused == set()
    assert "pytorch_lightning" in loaded_by("from vit_explain_callback import ViTExplainCallback")


def test_every_exported_name_has_its_home() -> None:
    assert set(vit_explain_callback.__all__) == set(vit_explain_callback._HOMES) <= set(dir(vit_explain_callback))
    with pytest.raises(AttributeError, match="no attribute 'Rolout'"):
        _ = vit_explain_callback.Rolout  # type: ignore[attr-defined]
