"""Print how the package is structured: sizes of files and functions, options, and uses of empty words.

`python -m tests.benchmarks.structure [CHECKOUT]` reads the source of this checkout, or of another one to compare with.
"""

from __future__ import annotations

import argparse
import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import TypeAlias

PACKAGE = "vit_explain_callback"
CALLBACK = "ViTExplainCallback"
EMPTY_WORDS = ("found", "own", "given", "known", "made", "kept", "taken", "wanted")
LONG_FUNCTION = 40  # lines

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


def identifiers(tree: ast.AST) -> Iterator[str]:
    """Every identifier of a module: names, attributes, parameters, keywords and functions."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name):
                yield name
            case ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name


def functions(tree: ast.AST) -> list[Function]:
    """The functions and methods of a module, also those within others."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(function: Function) -> int:
    """Lines of a function, from `def` to its end, without its docstring."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    docstring = function.body[0] if ast.get_docstring(function, clean=False) is not None else None
    return lines if docstring is None else lines - ((docstring.end_lineno or 0) - docstring.lineno + 1)


def options(tree: ast.AST) -> tuple[int, bool] | None:
    """The number of options of the callback, and whether it takes `**kwargs` beside them; None: it is not here."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == CALLBACK:
            for function in node.body:
                if isinstance(function, ast.FunctionDef) and function.name == "__init__":
                    parameters = function.args
                    count = len([*parameters.posonlyargs, *parameters.args, *parameters.kwonlyargs])
                    return count - 1, parameters.kwarg is not None  # without `self`
    return None


def report(checkout: Path) -> list[str]:
    """The lines to print for a checkout.

    Raises:
        FileNotFoundError: If it does not contain the package.
    """
    root = checkout / PACKAGE
    sources = {path.relative_to(root): path.read_text(encoding="utf-8") for path in sorted(root.rglob("*.py"))}
    if not sources:
        raise FileNotFoundError(f"There are no Python files in {root}.")
    trees = {path: ast.parse(text) for path, text in sources.items()}
    file_lines = {path: len(text.splitlines()) for path, text in sources.items()}
    function_lines = [
        (length(function), f"{path.as_posix()}:{function.name}")
        for path, tree in trees.items()
        for function in functions(tree)
    ]
    longest_file = max(file_lines, key=lambda path: file_lines[path])
    lines, longest_function = max(function_lines)
    long_functions = sum(lines > LONG_FUNCTION for lines, _ in function_lines)
    packages = sum(path.name == "__init__.py" for path in sources)
    readme = (checkout / "README.md").read_text(encoding="utf-8")
    count, rest = next(filter(None, map(options, trees.values())), (0, False))
    return [
        f"Python files           {len(sources)}, {sum(file_lines.values())} lines in {packages} packages",
        f"median file            {median(file_lines.values()):g} lines",
        f"longest file           {file_lines[longest_file]} lines, {longest_file.as_posix()}",
        f"longest function       {lines} lines, {longest_function}",
        f"functions              {len(function_lines)}, {long_functions} over {LONG_FUNCTION} lines without docstrings",
        f"README.md              {len(readme.split())} words, {len(readme.splitlines())} lines",
        f"{CALLBACK}     {count} options{', and **kwargs' if rest else ''}",
        "",
        *_word_table(trees),
    ]


def _word_table(trees: dict[Path, ast.Module]) -> list[str]:
    """How often each package uses each empty word as an identifier."""
    counts: dict[str, Counter[str]] = {}
    for path, tree in trees.items():
        package = path.parts[0] if len(path.parts) > 1 else "(top)"
        counts.setdefault(package, Counter()).update(name for name in identifiers(tree) if name in EMPTY_WORDS)
    total: Counter[str] = sum(counts.values(), Counter())
    counts |= {"all": total}
    heading = f"{'package':15}" + "".join(f"{word:>8}" for word in (*EMPTY_WORDS, "all"))
    return [heading] + [
        f"{package:15}" + "".join(f"{number:8}" for number in (*(uses[word] for word in EMPTY_WORDS), uses.total()))
        for package, uses in counts.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """Print the figures of a checkout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, nargs="?", default=Path(__file__).parents[2])
    print("\n".join(report(parser.parse_args(arguments).checkout)))


if __name__ == "__main__":
    main()
