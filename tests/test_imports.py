"""The layers: a module of the package imports only modules below it."""

from __future__ import annotations

import ast
from pathlib import Path

import vit_explain_callback

PACKAGE = Path(vit_explain_callback.__file__).parent
LAYERS: list[set[str]] = [
    {"rollout", "mha", "layout", "maps", "overlay", "isolation", "scale", "weights", "tensor_file", "_lightning"},
    {"capture", "flow", "probe", "animation", "drift", "map_statistics", "regions", "faithfulness", "blocks", "figure"},
    {"explanation", "methods", "snapshot", "metric", "curves"},
    {"filmstrip", "scalars", "photograph"},
    {"stack", "experiment"},
    {"vit", "fold"},
    {"checks", "subject"},
    {"batch"},
    {"explainer", "settings", "notices", "classifier"},
    {"report", "verdict", "ranks", "tensorboard", "gallery", "comparison"},
    {"validation", "explained", "writer"},
    {"observation", "series", "page"},
    {"callback", "cli"},
    {"__init__", "__main__"},
]
LIGHTNING = {"_lightning", "callback", "explained", "observation", "ranks", "tensorboard", "validation", "writer"}


def imported(source: str) -> set[str]:
    """Names of the modules that a source file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def layer(module: str) -> int:
    return next(height for height, modules in enumerate(LAYERS) if module in modules)


def upward_imports(module: str, source: str) -> set[str]:
    own = {name.split(".")[1] for name in imported(source) if name.startswith("vit_explain_callback.")}
    return {name for name in own if layer(name) >= layer(module)}


def test_every_module_has_a_layer_and_imports_only_downward() -> None:
    sources = {path.stem: path.read_text(encoding="utf-8") for path in PACKAGE.glob("*.py")}
    assert set(sources) == set().union(*LAYERS)
    assert [module for module, source in sources.items() if upward_imports(module, source)] == []


def test_only_the_top_knows_lightning() -> None:
    for path in PACKAGE.glob("*.py"):
        names = imported(path.read_text(encoding="utf-8"))
        uses = any(name.split(".")[0] in ("lightning", "pytorch_lightning") or "_lightning" in name for name in names)
        assert not uses or path.stem in LIGHTNING, path.name


def test_the_check_can_fail() -> None:
    assert upward_imports("rollout", "def f():\n    from vit_explain_callback.callback import x") == {"callback"}
    assert upward_imports("maps", "import vit_explain_callback.overlay") == {"overlay"}
    assert upward_imports("callback", "from vit_explain_callback.rollout import x") == set()


def test_exported_names_exist() -> None:
    assert all(hasattr(vit_explain_callback, name) for name in vit_explain_callback.__all__)
    assert vit_explain_callback.__all__ == sorted(vit_explain_callback.__all__)
