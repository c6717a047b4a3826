"""The notebooks, cell after cell in one namespace as Jupyter runs them, without Jupyter and in fewer steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
EVERY_NOTEBOOK = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
FEWER = {"max_steps=60": "max_steps=2", "num_inference_steps=25": "num_inference_steps=2"}


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
@EVERY_NOTEBOOK
def test_cells(path, tmp_path):
    code = "\n\n".join("".join(cell["source"]) for cell in code_cells(path))
    for given, fewer in FEWER.items():
        assert given in code
        code = code.replace(given, fewer)
    (tmp_path / "emoji").symlink_to(ROOT / "examples" / "emoji")
    (tmp_path / "notebooks").mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "CI"} | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "notebooks",
        env=environment | {"MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "pictures in the liked style" in done.stdout
    assert (tmp_path / "notebooks" / "outputs" / "emoji-kto-lora" / "pytorch_lora_weights.safetensors").is_file()


@EVERY_NOTEBOOK
def test_outputs_are_of_one_run_and_small(path):
    """What a reader sees is what the cells printed, from the first to the last."""
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 300_000
