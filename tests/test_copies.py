"""
The scripts share no code by import, so what they share is copied. Copies must not drift.

A top-level function, class or CONSTANT that two scripts define under one name must be the same text in both, with
decorators, comments and docstring. To let copies differ, give them different names, or list the name in DIFFERENT
with the reason. Reads text, imports nothing.

    python -m pytest tests/test_copies.py
"""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path for folder in (".", "data", "benchmarks") for path in (ROOT / folder).glob("*.py"))
DIFFERENT = {  # {name: why the scripts need it to differ}
    "pack": "finetune_vl.py's has images and their positions",
    "pack_model": "finetune_vl.py's leaves the vision tower its attention, and compares examples with images",
    "train": "the stage itself",
}


def names_defined(node):
    """Return the names that a top-level statement defines: of a function or class, or of ALL-CAPS constants."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    found = [inner.id for target in targets if target for inner in ast.walk(target) if isinstance(inner, ast.Name)]
    return [name for name in found if name.isupper()]


def definitions(sources):
    """Turn {script: source} into {name: {script: text}}, whole lines: decorators and trailing comments included."""
    found = defaultdict(dict)
    for script, source in sources.items():
        lines = source.splitlines()
        for node in ast.parse(source).body:
            first = min([node.lineno, *[decorator.lineno for decorator in getattr(node, "decorator_list", [])]])
            for name in names_defined(node):
                text = "\n".join(lines[first - 1 : node.end_lineno])
                found[name][script] = found[name].get(script, "") + text  # an `if` may not hide a second definition
    return found


def differing(copies):
    """Return the first two scripts of {script: text} whose texts differ, or None."""
    (first, text), *others = copies.items()
    return next(((first, other) for other, copy in others if copy != text), None)


SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in SCRIPTS}
SHARED = {name: copies for name, copies in definitions(SOURCES).items() if len(copies) > 1}


@pytest.mark.parametrize("name", sorted(set(SHARED) - set(DIFFERENT)))
def test_copies_are_identical(name):
    pair = differing(SHARED[name])
    assert not pair, f"{name} differs between {pair[0]} and {pair[1]}: make both the same, or rename one"


def test_exemptions_are_still_needed():
    needed = {name for name, copies in SHARED.items() if differing(copies)}
    assert set(DIFFERENT) <= needed, f"no longer needed in DIFFERENT: {sorted(set(DIFFERENT) - needed)}"


def test_scripts_are_found():
    assert "data/tiny.py" in SOURCES


@pytest.mark.parametrize(
    ("one", "other", "drifted"),
    [
        ("def f():\n    return 1\n", "\n\ndef f():\n    return 1", []),
        ("def f():\n    return 1  # why\n", "def f():\n    return 1\n", ["f"]),
        ("@cache\ndef f():\n    return 1\n", "@lru_cache\ndef f():\n    return 1\n", ["f"]),
        ("class C:\n    x = 1\n", "class C:\n    x = 2\n", ["C"]),
        ("LIMIT = 1  # of the paper\n", "LIMIT = 1\n", ["LIMIT"]),
        ("LIMIT: int = 1\n", "LIMIT: int = 2\n", ["LIMIT"]),
        ("A, B = 1, 2\n", "A, B = 1, 3\n", ["A", "B"]),
        ("def f():\n    return 1\n", "def g():\n    return 2\n", []),
        ("lower = 1\n", "lower = 2\n", []),
    ],
)
def test_drift_is_seen(one, other, drifted):
    found = definitions({"one.py": one, "other.py": other})
    assert sorted(name for name, copies in found.items() if len(copies) > 1 and differing(copies)) == drifted
