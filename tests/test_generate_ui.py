"""
The page of generate.py in a headless Chromium: this machine's alone, whatever the environment says.

    .venv/bin/python -m pytest tests/test_generate_ui.py -m slow    the page: needs requirements-ui.txt and chromium

With LOOSELEAF_SCREENSHOT=docs/generate_ui.png in the environment the second one renews the picture in the docs.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from pyarrow import parquet

import generate as script
from generate import generate

ROOT = Path(__file__).resolve().parent.parent
BASE = "data/tiny/model"
QUESTION = "Tom has 6 boxes with 7 coins in each. How many coins does Tom have now?"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_gradio = pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="gradio: see requirements-ui.txt")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and importlib.util.find_spec("playwright")), reason="a Chromium and playwright: requirements-ui.txt"
)


def test_without_gradio_it_says_what_to_install(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "gradio" else real(name, *args)
    )
    with pytest.raises(ValueError, match="--ui needs gradio: pip install gradio, or the exact set of requirements-ui"):
        generate(ui=True)


# -----------------------------------------------------------------------------
# the page


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def served(tmp_path):
    """A function that starts `generate.py --ui` and returns the address that it prints."""
    running = []

    def serve(base_model=BASE, **environment):
        command = [sys.executable, str(ROOT / "generate.py"), "--ui", "--base_model", base_model]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | environment
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=tmp_path
        )
        running.append(process)
        said = ""
        for line in process.stdout:
            said += line
            if found := re.search(r"Running on local URL: +(http://\S+)", line):
                return found[1]
        pytest.fail(f"the page did not open:\n{said}")

    yield serve
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture
def page():
    """A page of a headless Chromium that records where it asks for things, and what the last answer said when."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 720})
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.add_init_script(
            """window.seen = []; new MutationObserver(() => {
                const all = document.querySelectorAll('.bot.message'), last = all[all.length - 1];
                if (last && window.seen.at(-1) !== last.innerText) window.seen.push(last.innerText);
            }).observe(document, {subtree: true, childList: true, characterData: true});"""
        )
        yield page
        browser.close()


def send(page, text, answer):
    """Type a message, send it, and wait for `answer` to stand in the last bubble."""
    page.evaluate("window.seen = []")
    page.locator("textarea").first.fill(text)
    page.keyboard.press("Enter")
    page.wait_for_function(
        "text => [...document.querySelectorAll('.bot.message')].at(-1)?.innerText.trim() === text",
        arg=answer,
        timeout=60000,
    )


def answer_of(text, **flags):
    return generate(base_model=BASE, prompt=text, **flags)


@pytest.mark.slow
@needs_gradio
@needs_browser
def test_the_page_streams_an_answer_and_its_controls_act(served, page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = str(free_port())
    url = served(GRADIO_SERVER_PORT=wanted, GRADIO_SERVER_NAME="0.0.0.0", GRADIO_SHARE="True")  # only the port acts
    assert url == f"http://127.0.0.1:{wanted}"
    listening = [line.split()[1:4] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    port = f"{int(url.rpartition(':')[2]):04X}"
    assert [local for local, _, state in listening if local.endswith(f":{port}") and state == "0A"] == [
        f"0100007F:{port}"
    ]

    page.goto(url)
    box = page.locator("textarea").first

    expected = answer_of(QUESTION)
    send(page, QUESTION, expected)
    seen = [text.strip() for text in page.evaluate("window.seen") if "Loading" not in text]
    parts = [text for text in dict.fromkeys(seen) if text and text != expected]
    assert len(parts) >= 2 and all(expected.startswith(part) for part in parts), seen
    if os.environ.get("LOOSELEAF_SCREENSHOT"):
        page.mouse.move(0, 0)
        page.screenshot(path=ROOT / os.environ["LOOSELEAF_SCREENSHOT"])

    lines = iter([QUESTION, "And with 8?", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    spoken = generate(base_model=BASE, chat=True)
    assert spoken[1]["content"] == expected
    send(page, "And with 8?", spoken[3]["content"])  # the page remembers as the terminal does

    page.goto(url)  # a new conversation
    page.get_by_label("max new tokens").fill("3")
    page.keyboard.press("Tab")
    send(page, QUESTION, answer_of(QUESTION, max_new_tokens=3))
    page.get_by_text("The answer was cut at max new tokens.").wait_for()
    page.get_by_label("top k").fill("5")
    page.keyboard.press("Tab")
    box.fill("Hi")
    page.keyboard.press("Enter")
    page.get_by_text("--top_p and --top_k do nothing at --temperature 0").wait_for()
    assert page.asked and not [asked for asked in page.asked if not asked.startswith((url, "data:", "blob:"))]


@pytest.mark.slow
@needs_gradio
@needs_browser
def test_the_page_of_a_model_with_eyes_takes_images(served, page, tmp_path):
    rows = parquet.read_table(ROOT / "data" / "tiny_vl" / "test.parquet").slice(1, 2).to_pylist()
    paths = [tmp_path / f"{k}.png" for k in range(2)]
    for path, row in zip(paths, rows, strict=True):
        path.write_bytes(row["image"]["bytes"])
    prompt, flags = "Using LaTeX to perform OCR on the image.", {"base_model": "data/tiny_vl/model"}
    page.goto(served(base_model=flags["base_model"]))
    answers = [generate(prompt=prompt, image=str(path), **flags) for path in paths]
    assert answers[0] != answers[1]
    for path, answer in zip(paths, answers, strict=True):
        page.reload()  # a new conversation
        page.locator("input[type=file]").first.set_input_files(path)
        page.locator(".thumbnails img, .thumbnail-item img").first.wait_for()
        send(page, prompt, answer)


@pytest.mark.slow
@needs_gradio
@needs_browser
def test_an_answer_ends_with_its_stop_button_or_its_page(page, monkeypatch):
    steps = []

    def stream(messages, images, **sampling):
        try:
            for n in range(600):
                steps.append(n)
                yield "word " * n, None
                time.sleep(0.05)
        finally:
            steps.append("closed")

    sampling = {"max_new_tokens": 5, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "num_beams": 1}
    sampling |= {"repetition_penalty": 1.0, "seed": 0}
    port = free_port()
    monkeypatch.setenv("GRADIO_SERVER_PORT", str(port))
    args = (stream, "a model", sampling, False)
    threading.Thread(target=script.open_page, args=args, daemon=True).start()
    for end in (lambda: page.locator("button.stop-button").click(), page.close):
        while True:
            with contextlib.suppress(Exception):  # until the server listens
                page.goto(f"http://127.0.0.1:{port}")
                break
        steps.clear()
        page.locator("textarea").first.fill("Hi")
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.querySelector('.bot.message')?.innerText.includes('word')")
        end()
        started = time.time()
        while "closed" not in steps and time.time() - started < 20:
            time.sleep(0.1)
        assert steps[-1] == "closed" and len(steps) < 500
