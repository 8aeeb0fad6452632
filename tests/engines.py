"""
llama.cpp and vLLM, each in an environment of its own, for the tests that give them what the scripts write.

    make .venv-llamacpp/installed .venv-vllm/installed
"""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from test_flags import ROOT

# one sequence at a time with keys and values in float32, so that an answer does not depend on who else asks
LLAMA_CPP = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], int(sys.argv[2]), 1, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.fit_params, params.hostnames, params.port = False, ["127.0.0.1"], 0
server = xllamacpp.Server(params)
print("ready", server.listening_address, flush=True)
sys.stdin.read()  # until the test is done
"""


def engine(name, program):
    """Return the path of a program in an engine's environment; a test that needs one fails without it."""
    path = ROOT / f".venv-{name}" / "bin" / program
    if not (ROOT / f".venv-{name}" / "installed").exists():
        pytest.fail(f"no {name} here: make .venv-{name}/installed")
    return str(path)


def post(address, path, timeout=300, **fields):
    """Send JSON to a server of this machine, and return its answer."""
    data = json.dumps(fields).encode()
    request = urllib.request.Request(f"{address}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.load(answer)


@contextmanager
def llama_cpp(path, context=1024):
    """Run llama.cpp's server on a GGUF file; gives its address."""
    command = [engine("llamacpp", "python"), "-c", LLAMA_CPP, str(path), str(context)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if line.startswith("ready"):
                yield line.split()[1]
                return
        pytest.fail(f"llama.cpp does not load {path}:\n{process.stderr.read()[-3000:]}")
    finally:
        process.kill()
        process.communicate()
