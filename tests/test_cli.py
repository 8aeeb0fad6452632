"""
What `run_cli` makes of a command line, in process: no script is imported, and so no torch.

The function is cut out of the script's text and run with the script's own imports of the standard library and fire,
so a script that copied it without an import fails here.

    .venv/bin/python -m pytest tests/test_cli.py
"""

import ast
import contextlib
import functools
import json
import re
import sys
from pathlib import Path

import pytest
from test_flags import ROOT, SCRIPTS, entry_function, help_texts


def load_run_cli(path):
    """Return run_cli of the script at `path`."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    allowed = {"fire", *sys.stdlib_module_names}
    roots = [(getattr(node, "module", None) or node.names[0].name).partition(".")[0] for node in imports]
    kept = [node for node, root in zip(imports, roots, strict=True) if root in allowed]
    kept += [node for node in body if isinstance(node, ast.FunctionDef) and node.name == "run_cli"]
    names = {"__name__": path.stem}
    exec(compile(ast.Module(kept, []), str(path), "exec"), names)
    return names["run_cli"]


def load_entry(path):
    """Return a stand-in for the script's entry function: its signature and docstring, and nothing that it does."""
    source = path.read_text(encoding="utf-8")
    function = entry_function(source)
    function.body, function.decorator_list = function.body[:1], []
    names = {"__name__": path.stem}
    for node in ast.parse(source).body:  # the constants that are literals: a default may be one
        if isinstance(node, ast.Assign):
            with contextlib.suppress(ValueError):
                names[ast.unparse(node.targets[0])] = ast.literal_eval(node.value)
    exec(compile(ast.Module([function], []), str(path), "exec"), names)
    return names[function.name]


run_cli = load_run_cli(ROOT / "data" / "tiny.py")


def demo(
    *,
    base_model: str,
    output_dir: str = "out",
    steps: int = 5,
    learning_rate: float = 1e-3,
    bf16: bool = True,
    overwrite: bool = False,
):
    """Do nothing.

    Args:
        base_model: what to start from.
        output_dir: where to write, a folder that
            may be new.
        steps: how many.
        learning_rate: the peak.
        bf16: compute in bfloat16; --nobf16 for float32.
        overwrite: replace what is there.
    """
    return dict(locals())


def not_called(fn):
    """Return a function with the flags of `fn` that fails the test when it is called."""

    @functools.wraps(fn)
    def called(**flags):
        raise AssertionError("called in spite of a mistake on the command line")

    return called


never = not_called(demo)


@pytest.fixture
def cli(monkeypatch, capfd):
    """Call run_cli(demo) as `x.py ARGS` would; the required flag is added."""

    def call(*args, fn=demo, required=("--base_model", "m")):
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setattr(sys, "argv", ["x.py", *required, *args])
        return run_cli(fn)

    return call


DEFAULTS = dict(demo(base_model="m"))


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], {}),
        (["--steps", "7"], {"steps": 7}),
        (["--steps=7"], {"steps": 7}),
        (["--steps", "-1"], {"steps": -1}),
        (["--steps=-1"], {"steps": -1}),
        (["--steps", "1", "--steps", "2"], {"steps": 2}),
        (["-s", "7"], {"steps": 7}),
        (["-steps", "7"], {"steps": 7}),
        (["--learning_rate", "1"], {"learning_rate": 1.0}),
        (["--learning_rate", "1e-5"], {"learning_rate": 1e-5}),
        (["--learning_rate", "-1e-5"], {"learning_rate": -1e-5}),
        (["--learning_rate=-inf"], {"learning_rate": -float("inf")}),
        (["--learning-rate", "2"], {"learning_rate": 2.0}),
        (["--overwrite"], {"overwrite": True}),
        (["--overwrite=True"], {"overwrite": True}),
        (["--overwrite", "--steps", "7"], {"overwrite": True, "steps": 7}),
        (["--nobf16"], {"bf16": False}),
        (["--nobf16", "--steps", "7"], {"bf16": False, "steps": 7}),
        (["--bf16", "False"], {"bf16": False}),
        (["--output_dir", "007"], {"output_dir": "007"}),
        (["--output_dir", "1e3"], {"output_dir": "1e3"}),
        (["--output_dir", "None"], {"output_dir": "None"}),
        (["--output_dir", "-1"], {"output_dir": "-1"}),
        (["--output_dir", "a=b"], {"output_dir": "a=b"}),
        (["--output_dir=a=b"], {"output_dir": "a=b"}),
        (["--output_dir=--y"], {"output_dir": "--y"}),
        (["--output_dir=-y"], {"output_dir": "-y"}),
        (["--output_dir", "[a]"], {"output_dir": "[a]"}),
        (["--output_dir", "{a: 1}"], {"output_dir": "{a: 1}"}),
        (["--output_dir", "'a' \"b\" # c"], {"output_dir": "'a' \"b\" # c"}),
        (["--output_dir", ""], {"output_dir": ""}),
        (["--output_dir="], {"output_dir": ""}),
        (["--output_dir", "q_proj,v_proj"], {"output_dir": "q_proj,v_proj"}),
        (["--output_dir", "1,2"], {"output_dir": "1,2"}),
        (["--", "--steps", "7"], {"steps": 7}),
    ],
    ids=" ".join,
)
def test_values(cli, args, expected):
    got = cli(*args)
    assert got == DEFAULTS | expected
    assert {name: type(value) for name, value in got.items()} == {
        name: type(value) for name, value in (DEFAULTS | expected).items()
    }


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", "many"], "--steps takes int, got 'many'"),
        (["--steps", "1e3"], "--steps takes int, got '1e3'"),
        (["--steps", "1.0"], "--steps takes int, got '1.0'"),
        (["--steps="], "--steps takes int, got ''"),
        (["--learning_rate", "1e-5x"], "--learning_rate takes float, got '1e-5x'"),
        (["--bf16", "false"], "--bf16 .*false.*--bf16 or --nobf16"),
        (["--bf16", "true"], "--bf16 .*true.*--bf16 or --nobf16"),
        (["--overwrite", "0"], "--overwrite .*0.*--overwrite or --nooverwrite"),
        (["--bf16="], "--bf16 .*--bf16 or --nobf16"),
        (["--steps"], "--steps "),
        (["--steps", "--overwrite"], "--steps "),
        (["--learning_rate"], "--learning_rate "),  # float("True") is no number, but int(True) would be one
        (["--nosteps"], "--steps "),
        (["--output_dir"], "--output_dir "),
        (["--output_dir", "--steps", "7"], "--output_dir "),
        (["--output_dir", "-"], "--output_dir "),  # fire's separator; --output_dir=- passes it
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_values_of_another_type_and_missing_values(cli, args, message):
    with pytest.raises(SystemExit) as stop:
        cli(*args, fn=never)
    assert re.match(message, stop.value.code)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--step", "7"], "--step"),
        (["--learning-rat=1"], "--learning-rat"),
        (["--zzz", "1"], "--zzz"),
        (["--steps", "7", "--zzz"], "--zzz"),
        (["--nozzz"], "--nozzz"),
        (["--no-bf16"], "--no-bf16"),
        (["--no"], "--no"),
        (["--output_dir", "--y"], "--y"),
        (["--", "steps", "7"], "steps"),
        (["--", "--trace"], "--trace"),  # after a -- fire takes flags of its own; none of these is one
        (["--", "--interactive"], "--interactive"),
        (["stray"], "stray"),
        (["--steps", "7", "stray"], "stray"),
        (["--output_dir", "q_proj,", "v_proj"], "v_proj"),  # a space that the shell split at
        (["--overwrite=True", "True"], "True"),
        (["-zzz", "7"], "-zzz"),
        (["-", "--steps", "7"], "--steps"),
        (["--output_dir", "-y"], "-y"),  # --output_dir=-y passes it
        (["-o", "7"], "ambiguous"),
        (["--nobf16", "x"], "--nobf16"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unknown_flags_and_stray_words_are_errors_of_fire(cli, capfd, args, named):
    with pytest.raises(SystemExit) as stop:
        cli(*args, fn=never)
    assert stop.value.code == 2
    assert named in capfd.readouterr().err.splitlines()[0]


def test_missing_flag(cli, capfd):
    with pytest.raises(SystemExit) as stop:
        cli("--steps", "7", fn=never, required=())
    assert stop.value.code == 2
    assert "base_model" in capfd.readouterr().err.splitlines()[0]


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["--steps", "7", "--help"], ["--", "--help"]], ids=" ".join)
@pytest.mark.parametrize("required", [(), ("--base_model", "m")], ids=["alone", "with a flag"])
def test_help(cli, capfd, args, required):
    with pytest.raises(SystemExit) as stop:
        cli(*args, fn=never, required=required)
    shown = capfd.readouterr().err
    assert stop.value.code == 0
    assert all(f"--{name}" in shown for name in DEFAULTS), shown
    assert "FIRE" not in shown


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_help_of_a_script_shows_all_that_args_says(monkeypatch, capfd, path):
    """Fire drops part of a help text whose next line reads like `word: text`."""
    entry = load_entry(path)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as stop:
        load_run_cli(path)(entry)
    shown = " ".join(capfd.readouterr().err.split())
    assert stop.value.code == 0
    for flag, text in help_texts(entry_function(path.read_text(encoding="utf-8"))).items():
        assert f"--{flag}=" in shown
        assert text in shown, f"--help shows only a part of what Args says about --{flag}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_script_refuses_an_unknown_flag(monkeypatch, capfd, path):
    monkeypatch.setattr(sys, "argv", [path.name, "--zzz", "1"])
    with pytest.raises(SystemExit) as stop:
        load_run_cli(path)(not_called(load_entry(path)))
    assert stop.value.code == 2
    assert re.search("--zzz|required", capfd.readouterr().err.splitlines()[0])  # fire counts required flags first


def test_message_of_the_script_alone(cli):
    def check(value):
        raise ValueError(f"--steps {value} is too many")

    def script(*, base_model: str, steps: int = 1):
        check(steps)

    with pytest.raises(SystemExit) as stop:
        cli("--steps", "7", fn=script)
    assert stop.value.code == "error: --steps 7 is too many"


@pytest.mark.parametrize("error", [TypeError, RuntimeError, KeyError, AssertionError])
def test_other_errors_keep_their_traceback(cli, error):
    def script(*, base_model: str):
        raise error("inside")

    with pytest.raises(error):
        cli(fn=script)


def test_error_of_a_library_keeps_its_traceback(cli):
    def script(*, base_model: str):
        json.loads("{")  # its error is a ValueError

    with pytest.raises(json.JSONDecodeError) as stop:
        cli(fn=script)
    assert Path(stop.traceback[-1].path).parent.name == "json"


def test_result_is_returned_and_not_printed(cli, capfd):
    assert cli()["base_model"] == "m"
    assert capfd.readouterr().out == ""
