"""Imports run down only: one ordered list of packages, the lowest first."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vit_explain_callback

PACKAGE = Path(vit_explain_callback.__file__).parent
# What stands on one line may import one another; everything else imports only what stands above it here.
ORDER: list[set[str]] = [
    {"_files", "_terminal"},
    {"isolation", "options"},
    {"vit"},
    {"metrics"},
    {"methods", "visualization"},
    {"explanation", "adapters"},
    {"_explain_batch"},
    {"explainer"},
    {"tracking"},
    {"page"},
    {"tracker"},
    {"lightning", "cli"},
    {"__init__", "__main__"},
]
AT_ROOT = 10  # with the marker `py.typed`
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


def test_exported_names_exist() -> None:
    assert all(hasattr(vit_explain_callback, name) for name in vit_explain_callback.__all__)
    assert vit_explain_callback.__all__ == sorted(vit_explain_callback.__all__)


def loaded_by(statement: str) -> set[str]:
    """Names of the packages that a fresh Python loads for a statement."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_what_is_imported_loads_no_more_than_it_needs() -> None:
    heavy = {"torch", "lightning", "pytorch_lightning", "matplotlib"}
    assert loaded_by("import vit_explain_callback") & heavy == set()
    assert loaded_by("from vit_explain_callback import explain") & {"lightning", "pytorch_lightning"} == set()
    assert "pytorch_lightning" in loaded_by("from vit_explain_callback import ViTExplainCallback")


def test_every_exported_name_has_its_home() -> None:
    assert set(vit_explain_callback.__all__) == set(vit_explain_callback._HOME) <= set(dir(vit_explain_callback))
    with pytest.raises(AttributeError, match="no attribute 'Rolout'"):
        _ = vit_explain_callback.Rolout  # type: ignore[attr-defined]
