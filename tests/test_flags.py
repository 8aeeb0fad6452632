"""
Every flag of every script is documented, typed, used, and means the same in every script of the root folder.

Reads text, imports nothing. The flags of a script are the parameters of the function that it hands to `run_cli`.

    python -m pytest tests/test_flags.py
"""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path for folder in (".", "data", "benchmarks") for path in (ROOT / folder).glob("*.py"))
TYPES = ("bool", "int", "float", "str")  # what run_cli reads
SAME_NAME_OTHER_HELP = {  # {flag: why its help text must differ between the scripts of the root folder}
    "temperature": "generate.py takes 0 for greedy; a policy that is trained must sample",
    "lr_scheduler_type": "ppo_gsm8k.py has no warmup, and three schedules of its own",
    "dtype": "ppo_gsm8k.py takes no float16",
    "lora_r": "ppo_gsm8k.py takes 0 for training all weights",
    "lora_alpha": "finetune_vl.py has no --use_rslora",
    "prompt": "generate.py asks it where there is no file, too",
}


def entry_function(source):
    """Return the ast node of the function in `run_cli(NAME)` under `if __name__ == "__main__":`."""
    tree = ast.parse(source)
    main = [node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
    lines = [ast.unparse(line) for node in main for line in node.body]
    called = [line[len("run_cli(") : -1] for line in lines if re.fullmatch(r"run_cli\(\w+\)", line)]
    assert len(called) == 1, 'a script ends with `if __name__ == "__main__":` and `run_cli(FUNCTION)`'
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == called[0])


def help_texts(function):
    """Return {flag: help text} from the docstring's `Args:`; a text may go on over deeper indented lines."""
    _, _, args = (ast.get_docstring(function) or "").partition("Args:\n")
    args = re.split(r"\n\s*\n", args)[0]
    found = re.findall(r"^    (\w+): (.+(?:\n {5,}.+)*)", args, re.M)
    assert len(found) == len(dict(found)), "Args describes a flag twice"
    return {flag: " ".join(text.split()) for flag, text in found}


def problems(source):
    """Return what is wrong with the flags of one script, as a list of sentences."""
    function = entry_function(source)
    assigned = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    constants = {ast.unparse(node.targets[0]): node.value for node in assigned}
    args = function.args
    flags = [arg.arg for arg in args.kwonlyargs]
    wrong = []
    if args.posonlyargs or args.args or args.vararg or args.kwarg:
        wrong.append("flags are keyword-only, and listed one by one: def f(*, ...)")
    described = list(help_texts(function))
    if described != flags:
        wrong.append(f"Args lists the flags in the order of the signature: {flags}, not {described}")
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        hint = ast.unparse(arg.annotation) if arg.annotation else "no type"
        if hint not in TYPES:
            wrong.append(f"--{arg.arg} has {hint}, not one of {', '.join(TYPES)}")
        if default is not None:
            try:
                value = ast.literal_eval(constants.get(ast.unparse(default), default))
            except ValueError:
                wrong.append(f"--{arg.arg}: the default is neither a literal nor a constant that is one")
                continue
            good = {"bool": bool, "int": int, "float": (int, float), "str": str}.get(hint, object)
            if not isinstance(value, good) or (isinstance(value, bool) and hint != "bool"):
                wrong.append(f"--{arg.arg}: the default {value!r} is no {hint}")
    inside = [node for line in function.body for node in ast.walk(line)]
    read = {node.id for node in inside if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    read |= set(re.findall(r'\bflags\["(\w+)"\]', source))  # helpers that are given all of them
    wrong += [f"--{flag} is never read" for flag in flags if flag not in read]
    return wrong


def differing_help(sources):
    """Turn {script: source} into {flag: {help text: [scripts]}} for the flags with more than one help text."""
    found = defaultdict(lambda: defaultdict(list))
    for script, source in sources.items():
        for flag, text in help_texts(entry_function(source)).items():
            found[flag][text].append(script)
    return {flag: dict(texts) for flag, texts in found.items() if len(texts) > 1}


ROOT_SOURCES = {path.name: path.read_text(encoding="utf-8") for path in SCRIPTS if path.parent == ROOT}
DIFFERING = differing_help(ROOT_SOURCES)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_flags_are_typed_described_and_used(path):
    wrong = problems(path.read_text(encoding="utf-8"))
    assert not wrong, "\n".join(wrong)


def test_one_flag_means_one_thing():
    undeclared = {flag: texts for flag, texts in DIFFERING.items() if flag not in SAME_NAME_OTHER_HELP}
    lines = [f"--{flag}  {', '.join(who)}: {text}" for flag in undeclared for text, who in undeclared[flag].items()]
    assert not lines, "one flag, two help texts:\n" + "\n".join(lines)


def test_exemptions_are_still_needed():
    unneeded = set(SAME_NAME_OTHER_HELP) - set(DIFFERING)
    assert not unneeded, f"no longer needed in SAME_NAME_OTHER_HELP: {sorted(unneeded)}"


GOOD = '''
def f(*, steps: int = 1, names: str = "a,b"):
    """Do it.

    Args:
        steps: how many,
            over all.
        names: of them.
    """
    flags = dict(locals())
    return steps, names


if __name__ == "__main__":
    run_cli(f)
'''


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("", "", None),
        ("*, ", "", "keyword-only"),
        (": int", "", "no type"),
        (": int", ": int | None", "not one of"),
        (": str", ": list[str]", "not one of"),
        ("= 1", "= LIMIT", "neither a literal"),
        ("= 1", "= os.cpu_count()", "neither a literal"),
        ("= 1", "= True", "is no int"),
        ("        names: of them.\n", "", "Args lists"),
        ("names: of them.", "name: of them.", "Args lists"),
        ("return steps, names", "return steps", "--names is never read"),
    ],
)
def test_complaints(old, new, complaint):
    wrong = problems(GOOD.replace(old, new, 1))
    assert bool(wrong) == bool(complaint) and (complaint or "") in "\n".join(wrong)


def test_help_that_differs_is_seen():
    assert help_texts(entry_function(GOOD)) == {"steps": "how many, over all.", "names": "of them."}
    rewrapped = GOOD.replace("how many,\n            over all", "how many, over all")
    assert not differing_help({"a.py": GOOD, "b.py": rewrapped})
    assert list(differing_help({"a.py": GOOD, "b.py": GOOD.replace("over all", "a GPU")})) == ["steps"]
