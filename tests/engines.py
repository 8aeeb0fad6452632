"""
llama.cpp and vLLM, each in an environment of its own, for the tests that give them what the scripts write.

    make .venv-llamacpp/installed .venv-vllm/installed
"""

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

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
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            address = next((line.split()[1] for line in process.stdout if line.startswith("ready")), None)
            if address is None:
                log.seek(0)
                pytest.fail(f"llama.cpp does not load {path}:\n{log.read()[-3000:]}")
            yield address
        finally:
            process.kill()
            process.communicate()


@contextmanager
def vllm(command, tmp_path):
    """Run a `vllm serve ...` command, as a list of words, on a CPU and a free port; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [engine("vllm", "vllm"), *command[1:], "--host", "127.0.0.1", "--port", str(port)]
    # nothing is compiled first; and without the second flag it takes nearly all memory that the machine has
    command += ["--enforce-eager", "--gpu-memory-utilization", "0.15"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    with open(tmp_path / "vllm.log", "w+") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | settings, cwd=tmp_path, start_new_session=True
        )
        try:
            address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 900
            while not healthy(address):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    pytest.fail(f"{' '.join(command)}\n{log.read()[-3000:]}")
                time.sleep(1)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(60)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # its workers


def healthy(address):
    """Say whether a server is up."""
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except OSError:
        return False
