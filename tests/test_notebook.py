"""
docs/finetune.ipynb runs from a clean kernel, learns something, and holds no copy of a function.

    .venv/bin/python -m pytest tests/test_notebook.py              no copies, no stored output
    .venv/bin/python -m pytest tests/test_notebook.py -m slow      runs it: needs requirements-notebook.txt
"""

import ast
import json
import re

import pytest
from test_flags import ROOT

NOTEBOOK = ROOT / "docs" / "finetune.ipynb"
CODE = [c for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


def test_it_defines_no_function_and_stores_no_output():
    for cell in CODE:
        nodes = ast.walk(ast.parse("".join(cell["source"])))
        assert not [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)]
        assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.slow
def test_it_runs_from_a_clean_kernel(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.delenv("MPLBACKEND")  # the kernel draws into the notebook
    for name in ("finetune.py", "data", "templates"):
        (tmp_path / name).symlink_to(ROOT / name)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    html = "".join(output.data.get("text/html", "") for output in outputs if output.output_type == "execute_result")
    assert html.count("#fd6") > 10 and html.count("#eee") > 30  # learned tokens, and the prompt's
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "2,000 rows" in text and "examples start at [0, " in text
    assert float(re.search(r"eval_loss ([\d.]+), eval_token_acc", text)[1]) < 1.0
    assert any("image/png" in output.get("data", {}) for output in outputs)
