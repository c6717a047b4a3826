"""What an import costs: nothing that is heavy until a name is used."""

import subprocess
import sys

import pytest


HEAVY = {"torch", "transformers", "diffusers", "trl", "peft", "accelerate", "datasets", "numpy"}


@pytest.mark.parametrize(
    "code",
    [
        "import trl_diffusion; dir(trl_diffusion); trl_diffusion.__version__",
        "from trl_diffusion.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    ],
    ids=["package", "help of the command"],
)
def test_loads_nothing_heavy(code):
    code += "\nimport sys; print(sorted(name for name in sys.modules if '.' not in name))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(eval(result.stdout.splitlines()[-1]))
    assert "trl_diffusion" in loaded
    assert not loaded & HEAVY


def test_a_name_loads_what_it_needs():
    import trl_diffusion

    for name in trl_diffusion.__all__:
        assert getattr(trl_diffusion, name).__name__ == name
    assert sorted(trl_diffusion._NAMES) == trl_diffusion.__all__
    assert set(trl_diffusion.__all__) <= set(dir(trl_diffusion))
    with pytest.raises(AttributeError, match="module 'trl_diffusion' has no attribute 'KTOTrainer'"):
        trl_diffusion.KTOTrainer  # noqa: B018
