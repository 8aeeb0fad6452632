"""
What the documents name exists: scripts, flags, files, tests, make targets, headings.

Reads every Markdown file, the Makefile and, in the scripts, the docstrings and messages that show a command.
Imports nothing.

    python -m pytest tests/test_docs.py
"""

import ast
import re
from fnmatch import fnmatch

import pytest
from test_flags import ROOT, SCRIPTS, entry_function

HISTORY = ("docs/LOG.md",)  # tells of what was, so it may name what is gone
EXTENSIONS = "py md json jsonl jinja txt toml yaml yml sh cfg ini lock ipynb parquet safetensors pth pt csv png".split()
# what runs and other projects write: a path in `backticks` that fits one of these need not be in the repository
GENERATED = (
    "out/*",
    "images/",
    "data/gsm8k/*.parquet",
    "runs/*",
    "adapter/*",
    "checkpoint-*",
    "tensorboard/*",
    "rollout/",
    "plots/*",
    "model/",
    "val_generations/",
    "my_rows.jsonl",
)
# files of a run folder, of a model folder and of a data folder, named without their folder
GENERATED_NAMES = """
    run.json log.jsonl summary.json config.json generation_config.json params.json
    tokenizer.json tokenizer_config.json chat_template.jinja
    trainer_state.json validation.jsonl predictions.jsonl dataset_info.json
    curves.png loss.png learning_rate.png eval_loss.png eval_token_acc.png
    train.jsonl train.parquet test.parquet
""".split()
GENERATED_EXTENSIONS = ("safetensors", "pth")
FOREIGN_FLAGS = """
    model_type sft_type eval_steps dataset_test_ratio merge_lora
    max-lora-rank no-enable-chunked-prefill
""".split()  # ms-swift's, vLLM's


def markdown_files():
    """Return the Markdown files of the repository, the ones that runs wrote left out."""
    paths = [path for depth in ("*.md", "*/*.md", "*/*/*.md") for path in ROOT.glob(depth)]
    names = {path: path.relative_to(ROOT).as_posix() for path in paths}
    return sorted(p for p, n in names.items() if not n.startswith((".", "out/", "runs/")) and ".incomplete" not in n)


DOCS = markdown_files()


def named(paths):
    return {"argvalues": paths, "ids": [path.relative_to(ROOT).as_posix() for path in paths]}


def flags_of(path):
    """Return {flag: type} of a script."""
    entry = entry_function(path.read_text(encoding="utf-8"))
    return {arg.arg: ast.unparse(arg.annotation) if arg.annotation else "" for arg in entry.args.kwonlyargs}


FLAGS = {path.relative_to(ROOT).as_posix(): flags_of(path) for path in SCRIPTS}


def split_markdown(text):
    """Return (the text of the fenced blocks, the text outside of them)."""
    fences = re.findall(r"^ *```.*\n((?:.*\n)*?) *```", text, re.M)
    return "\n".join(fences), re.sub(r"^ *```.*\n(?:.*\n)*? *```", "", text, flags=re.M)


def commands(text):
    """Return [(script, rest of the line)] for each `python x.py ...` and `torchrun ... x.py ...` in `text`."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        for part in re.split(r"&&|\|\||[|;>]|\s#\s", line):
            match = re.search(r"\b(?:python3?|torchrun|deepspeed|accelerate launch)\s(.*)", part)
            words = match.group(1).split() if match else []
            at = next((i for i, word in enumerate(words) if re.search(r"\.py\b", word)), None)
            if at is not None and "-m" not in words[:at]:
                script = re.search(r"[\w{}./-]*\.py", words[at]).group().removeprefix("./")
                stopped = words[at].rstrip("`")[-1] in ",.:;)"  # `python x.py, which ...`: the command ends here
                found.append((script, "" if stopped else " ".join(words[at + 1 :])))
    return found


def command_problems(text, strict):
    """Return what is wrong with the commands in `text`; where that is code (`strict`), with their values too."""
    wrong = []
    for script, rest in commands(text):
        if "{" in script:  # filled in when the message is printed
            continue
        if script not in FLAGS:
            wrong.append(f"there is no script {script}")
            continue
        words = rest.split()
        for i, word in enumerate(words):
            match = re.match(r"[`\"'(\[]*--([A-Za-z][\w-]*)(=?)", word)
            if not match:
                continue
            name = match.group(1).replace("-", "_")
            hint = FLAGS[script].get(name)
            if hint is None and FLAGS[script].get(name.removeprefix("no")) != "bool" and name != "help":
                wrong.append(f"{script} has no flag --{name}")
            follower = words[i + 1] if i + 1 < len(words) else "--"
            alone = follower.startswith("--") or bool(match.group(2))
            if strict and hint == "bool" and (not alone or match.group(2)) and follower not in ("...", "\\"):
                wrong.append(f"{script} --{name} takes no value: --{name} or --no{name}")
            if strict and hint and hint != "bool" and alone and not match.group(2):
                wrong.append(f"{script} --{name} needs a value")
    return wrong


def shown_by(path):
    """Return the strings of a script, docstrings included, with {} for what an f-string fills in."""
    shown = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            shown.append("".join(str(part) for part in parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            shown.append(node.value)
    return shown


@pytest.mark.parametrize("path", **named(SCRIPTS))
def test_commands_in_scripts(path):
    wrong = [problem for text in shown_by(path) for problem in command_problems(text, strict=False)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", **named(DOCS))
def test_commands_in_documents(path):
    fenced, prose = split_markdown(path.read_text(encoding="utf-8"))
    inline = "\n".join(re.findall(r"`([^`]+)`", prose))
    if path.relative_to(ROOT).as_posix() in HISTORY:
        return
    wrong = command_problems(fenced, strict=True) + command_problems(inline, strict=True)
    assert not wrong, "\n".join(wrong)


def test_commands_in_the_makefile():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name, value in re.findall(r"^(\w+) := (.*)$", text, re.M):
        text = text.replace(f"$({name})", value)
    wrong = command_problems(text, strict=True)
    assert not wrong, "\n".join(wrong)


def bare_flags(prose):
    """Return the flags that `prose` names alone in backticks, as in `--batch_size` or `--max_steps 2`."""
    return [name for code in re.findall(r"`([^`]+)`", prose) for name in re.findall(r"^--([A-Za-z][\w-]*)", code)]


@pytest.mark.parametrize("path", **named(DOCS))
def test_flags_named_in_documents(path):
    if path.relative_to(ROOT).as_posix() in HISTORY:
        return
    known = {flag for flags in FLAGS.values() for flag in flags} | set(FOREIGN_FLAGS)
    known |= {f"no{flag}" for flags in FLAGS.values() for flag, hint in flags.items() if hint == "bool"}
    _, prose = split_markdown(path.read_text(encoding="utf-8"))
    unknown = sorted({name for name in bare_flags(prose) if name not in known})
    assert not unknown, f"no script has {unknown}; the flag of another tool goes into FOREIGN_FLAGS"


def looks_like_a_path(code):
    """Whether the text of `backticks` is a path of the repository: a known extension, or a slash at the end."""
    code = re.sub(r"(::\w+|:\d+(-\d+)?)$", "", code)
    plain = re.fullmatch(r"[\w.*-]+(/[\w.*-]+)*/?", code)
    return bool(plain) and (code.endswith("/") or code.rpartition(".")[2] in EXTENSIONS) and not code.startswith(".")


def generated(code):
    """Whether `code` names something that a run writes; OUT/..., MODEL/... stand for folders of the reader's."""
    return (
        code.rpartition(".")[2] in GENERATED_EXTENSIONS
        or code in GENERATED_NAMES
        or code.split("/")[0].isupper()
        and "/" in code
        or any(fnmatch(code, pattern) for pattern in GENERATED)
    )


def path_problems(prose, folder):
    """Return what is wrong with the paths in backticks in `prose` of a document in `folder`."""
    prose = re.sub(r"\[[^\]]*\]\(https?://[^)]*\)", "", prose)  # `ppo.py` linked to another repository
    wrong = []
    for code in re.findall(r"`([^`\n]+)`", prose):
        target, _, test = code.partition("::")
        target = re.sub(r":\d+(-\d+)?$", "", target)
        if not looks_like_a_path(code) or generated(target):
            continue
        places = [place for place in (ROOT, folder) if list(place.glob(target))]
        if not places:
            wrong.append(f"there is no {target}")
        elif test:
            source = (places[0] / target).read_text(encoding="utf-8")
            if not re.search(rf"^ *(def|class) {test}\b", source, re.M):
                wrong.append(f"there is no {test} in {target}")
    return wrong


@pytest.mark.parametrize("path", **named(DOCS))
def test_paths_in_backticks(path):
    if path.relative_to(ROOT).as_posix() in HISTORY:
        return
    _, prose = split_markdown(path.read_text(encoding="utf-8"))
    wrong = path_problems(prose, path.parent)
    assert not wrong, "\n".join(wrong) + "\n(what a run writes goes into GENERATED or GENERATED_NAMES)"


def anchors(text):
    """Return the anchors of a document's headings, as GitHub makes them."""
    _, prose = split_markdown(text)
    titles = [re.sub(r"[^\w\- ]", "", title.strip().lower()) for title in re.findall(r"^#+ (.+)$", prose, re.M)]
    return [title.replace(" ", "-") for title in titles]


def link_problems(text, folder):
    """Return what is wrong with the relative links of the document `text` in `folder`."""
    _, prose = split_markdown(text)
    prose = re.sub(r"`[^`\n]*`", "code", prose)
    wrong = []
    for link in re.findall(r"\]\(<?([^)\s>]+)", prose) + re.findall(r"^\[[^\]]+\]: *(\S+)", prose, re.M):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        there = folder / target if target else None
        if there and not there.exists():
            wrong.append(f"the link {link} leads nowhere")
        elif anchor and (not there or there.suffix == ".md"):
            if anchor not in anchors(there.read_text(encoding="utf-8") if there else text):
                wrong.append(f"the link {link} names no heading")
    return wrong


@pytest.mark.parametrize("path", **named(DOCS))
def test_links(path):
    wrong = link_problems(path.read_text(encoding="utf-8"), path.parent)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", **named(DOCS))
def test_make_targets(path):
    fenced, prose = split_markdown(path.read_text(encoding="utf-8"))
    code = fenced.splitlines() + re.findall(r"`([^`\n]+)`", prose)
    asked = {match.group(1) for line in code if (match := re.match(r"\s*(?:\$ )?make ([a-z][\w-]*)", line))}
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert asked <= targets, f"the Makefile has no {sorted(asked - targets)}"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("python data/tiny.py --steps 5 --seed=1", None),
        ("python data/tiny.py --steps 5 \\\n    --sed 1", "no flag --sed"),
        ("CUDA_VISIBLE_DEVICES=0 torchrun --nproc_per_node 2 data/tiny.py --step 5", "no flag --step"),
        ("$ .venv/bin/python data/tiny.py --help && python data/tinny.py", "no script data/tinny.py"),
        ("python data/tiny.py --steps  # all of them", "--steps needs a value"),
        ("python data/tiny.py --steps --seed 1", "--steps needs a value"),
        ("python data/tiny.py, which is enough", None),
        ("python -m pytest tests/test_docs.py --durations 5", None),
        ("python data/tiny.py | tee --append log", None),
    ],
)
def test_a_wrong_command_is_seen(text, complaint):
    wrong = command_problems(text, strict=True)
    assert bool(wrong) == bool(complaint) and (complaint or "") in "\n".join(wrong)


@pytest.mark.parametrize(
    ("prose", "complaint"),
    [
        ("`data/tiny.py`, `data/`, `data/*.py`, `data/tiny.py:12`", None),
        ("`tiny.py` beside the document", None),
        ("`data/tinny.py`", "no data/tinny.py"),
        ("`dada/`", "no dada/"),
        ("`tests/test_docs.py::test_links`", None),
        ("`tests/test_docs.py::test_lunks`", "no test_lunks"),
        ("`out/finetune/adapter/`, `OUT/run.json`, `log.jsonl`, `model-1.safetensors`", None),
        ("`data/gsm8k/train.parquet`", None),
        ("`batch/step`, `e.g.`, `a / b`, `x.shape`, `https://a.b/c.py`", None),
        ("[`ppo.py`](https://example.com/ppo.py)", None),
    ],
)
def test_a_wrong_path_is_seen(prose, complaint):
    wrong = path_problems(prose, ROOT / "data")
    assert bool(wrong) == bool(complaint) and (complaint or "") in "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[a](tiny.py) [b](../tests/) [c](https://a.b/c) [d](#two-words)\n\n## Two `words`\n", None),
        ("[a](tinny.py)", "leads nowhere"),
        ("[a][1]\n\n[1]: tinny.py\n", "leads nowhere"),
        ("[a](#three)\n\n# Two\n", "names no heading"),
        ("```\n[a](nowhere.md)\n```\n`[b](nowhere.md)`", None),
    ],
)
def test_a_wrong_link_is_seen(text, complaint):
    wrong = link_problems(text, ROOT / "data")
    assert bool(wrong) == bool(complaint) and (complaint or "") in "\n".join(wrong)


def test_flags_alone_in_backticks_are_seen():
    assert bare_flags("`--steps` and `--seed 1`, not `x.py --other` nor --bare") == ["steps", "seed"]
