"""
generate.py and export_hf_checkpoint.py with images, on the embedded Qwen2-VL.

    .venv/bin/python -m pytest tests/test_generate_vl.py
"""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

import export_hf_checkpoint
import finetune_vl
import generate as script
from generate import generate, latex, score_answer

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data" / "tiny_vl"
BASE = str(DATA / "model")
PROMPT = "Using LaTeX to perform OCR on the image."
FLAGS = {"data_path": str(DATA / "test.parquet"), "prompt": PROMPT, "score": "latex", "max_samples": 48}
FLAGS |= {"max_new_tokens": 40}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The folder of an adapter after a few steps that move the style."""
    out = tmp_path_factory.mktemp("vl")
    finetune_vl.train(output_dir=str(out), max_samples=400, num_epochs=2, batch_size=16, save_steps=1.0)
    return str(out / "adapter")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Paths of the first test images."""
    folder = tmp_path_factory.mktemp("images")
    rows = parquet.read_table(DATA / "test.parquet").to_pylist()[:48]
    for i, row in enumerate(rows):
        (folder / f"{i}.png").write_bytes(row["image"]["bytes"])
    return [str(folder / f"{i}.png") for i in range(len(rows))]


def answers(folder, **flags):
    summary = generate(**FLAGS | {"output_dir": str(folder)} | flags)
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return summary, [row["prediction"] for row in rows], rows


# -----------------------------------------------------------------------------
# scores


def test_latex_by_hand():
    found = latex("x^{2}", "x ^ { 2 }")
    assert found == {
        "score": 0.0,
        "edit_distance": 4 / 9,  # four spaces of nine characters
        "bleu4": pytest.approx(1.0),
        "score_without_spaces": 1.0,
        "edit_distance_without_spaces": 0.0,
    }
    found = latex(r"\frac{a}{b}", r"\frac{a}{c}")  # seven tokens, the last but one is wrong
    # 6 of 7 tokens, 4 of 6 pairs, 3 of 5 triples, 2 of 4 quadruples
    assert found["bleu4"] == pytest.approx((6 / 7 * 4 / 6 * 3 / 5 * 2 / 4) ** 0.25)
    assert found["edit_distance"] == pytest.approx(1 / 11) and found["score"] == found["score_without_spaces"] == 0
    assert latex("x", "x")["score"] == 1.0 and latex("x", "x")["bleu4"] == pytest.approx(1.0)


def test_score_answer_knows_latex():
    assert score_answer({"prediction": "a b", "reference": "a b", "index": 0}, "latex", "")["score"] == 1.0


# -----------------------------------------------------------------------------
# answers


def test_a_file_of_images_is_answered_and_scored(tmp_path):
    summary, said, rows = answers(tmp_path / "a", base_model=BASE)
    assert summary["answered"] == 48 and summary["score"]["mean"] == 0
    assert summary["score_without_spaces"]["mean"] > 0.85
    assert set(rows[0]) >= {"messages", "reference", "prediction", "score", "bleu4"} and "images" not in rows[0]
    assert rows[0]["messages"] == [{"role": "user", "content": f"<image>{PROMPT}"}]
    _, alone, _ = answers(tmp_path / "b", base_model=BASE, micro_batch_size=5)
    assert alone == said  # left padding, and images dealt out to their rows


def test_answers_are_those_of_transformers_own_generate(tmp_path, images):
    """Prompt from the template's list form, positions found by the model, one by one."""
    _, said, _ = answers(tmp_path, base_model=BASE, max_samples=8)
    model = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32)
    tokenizer, processor = AutoTokenizer.from_pretrained(BASE), AutoImageProcessor.from_pretrained(BASE)
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    for path, answer in zip(images[:8], said, strict=True):
        pixels = processor(images=[script.Image.open(path)], return_tensors="pt")
        pads = int(pixels["image_grid_thw"].prod()) // 4
        ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * pads), return_tensors="pt").input_ids
        types = ids.eq(model.config.image_token_id).int()
        out = model.generate(input_ids=ids, mm_token_type_ids=types, **pixels, max_new_tokens=40, do_sample=False)
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == answer


def test_an_image_on_the_command_line_and_in_the_chat(tmp_path, images, monkeypatch):
    _, said, _ = answers(tmp_path, base_model=BASE, max_samples=3)
    assert generate(base_model=BASE, prompt=PROMPT, image=images[1]) == said[1] != said[2]
    lines = iter([PROMPT, "/new", PROMPT, "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    spoken = generate(base_model=BASE, chat=True, prompt=PROMPT, image=images[2])
    assert [turn["content"].count("<image>") for turn in spoken] == [1, 0]  # the conversation after /new
    assert spoken[1]["content"] == said[2]


def test_validation_rows_of_a_run_are_answered(adapter, tmp_path):
    flags = {"lora_weights": adapter, "data_path": str(Path(adapter).parent / "validation.jsonl"), "prompt": ""}
    summary, _, rows = answers(tmp_path, **flags)
    assert summary["answered"] == summary["rows"] == 20 and len(rows) == 20


def test_other_images_are_other_answers_to_the_log(tmp_path, images):
    rows = [{"messages": [{"role": "user", "content": f"<image>{PROMPT}"}], "images": [images[0]]}]
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(rows[0]) + "\n")
    flags = {"base_model": BASE, "data_path": str(data), "prompt": "", "score": "", "output_dir": str(tmp_path / "o")}
    said = []
    for image in images[:2]:
        data.write_text(json.dumps(rows[0] | {"images": [image]}) + "\n")
        generate(**FLAGS | flags)
        said.append(json.loads((tmp_path / "o" / "predictions.jsonl").read_text())["prediction"])
    assert said[0] != said[1] and len(list((tmp_path / "o").glob("answers-*.jsonl"))) == 2


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"base_model": BASE, "prompt": "a", "image": "none.png"}, "image 'none.png': cannot be read"),
        ({"base_model": "data/tiny/model", "prompt": "a", "image": "IMAGE"}, "data/tiny/model reads text only"),
        ({"base_model": BASE, "image": "IMAGE"}, "--input and --image go with --prompt"),
        ({"base_model": BASE, "image": "IMAGE", "prompt": "a", "data_path": "b"}, "--input and --image go with"),
        ({"base_model": BASE, "ui": True, "prompt": "a"}, "one at a time"),
    ],
)
def test_bad_flags_are_refused_before_the_model_loads(monkeypatch, images, flags, message):
    for auto in (script.AutoModelForCausalLM, script.AutoModelForImageTextToText):
        monkeypatch.setattr(auto, "from_pretrained", lambda *args, **kw: pytest.fail("loaded"))
    real = importlib.util.find_spec
    has = lambda name, *args: name == "gradio" or real(name, *args)  # it may not be there
    monkeypatch.setattr(importlib.util, "find_spec", has)
    flags = {name: images[0] if value == "IMAGE" else value for name, value in flags.items()}
    with pytest.raises(ValueError, match=message):
        generate(**flags)


def test_a_row_with_a_missing_image_is_left_out_by_name(tmp_path, images, capsys):
    rows = [{"image": images[0], "text": "x"}, {"image": "none.png", "text": "x"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"base_model": BASE, "data_path": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / "o")}
    summary = generate(**FLAGS | flags)
    assert summary["answered"] == 1 and "left out row 2" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# the merged model


def test_the_merged_model_answers_as_the_adapter_does(adapter, tmp_path):
    summary, said, _ = answers(tmp_path / "adapter", lora_weights=adapter)
    assert summary["score"]["mean"] > 0.3  # the style has moved: 0 before
    merged = tmp_path / "merged"
    report = export_hf_checkpoint.export(
        base_model=BASE, lora_weights=adapter, output_dir=str(merged), save_dtype="float32"
    )
    assert answers(tmp_path / "merged_answers", base_model=str(merged))[1] == said
    settings = json.loads((merged / "preprocessor_config.json").read_text())
    assert settings["patch_size"] == 8 and report["check"]["kl"] < 1e-9

    # the check sees the vision tower: text alone would not
    def difference(folder):
        model, _ = export_hf_checkpoint.open_model(BASE, tmp_path / "scratch")
        return export_hf_checkpoint.self_check(model, None, Path(folder), tmp_path / "scratch", "")["kl"]

    broken = tmp_path / "broken"
    shutil.copytree(BASE, broken)
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if "visual.merger" in name and name.endswith("weight") and "mlp" in name)
    save_file(tensors | {name: tensors[name] * 1.1}, broken / "model.safetensors", metadata={"format": "pt"})
    assert difference(broken) > 1e-6 and difference(BASE) == 0
