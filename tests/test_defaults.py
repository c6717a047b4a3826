"""Defaults that depend on something else: on the loss, and on the model's family."""

import pytest
import torch

from tests import tiny
from tests.conftest import embed, pairs
from tests.test_families import BUILD, RESOLUTION
from tests.test_methods import trained, trainer_of
from trl_diffusion import DiffusionDPOConfig
from trl_diffusion.losses import dpo_loss


# ---- Prompts that are lost ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILD)
def test_empty_prompts_of_each_family(tmp_path, name):
    """None where the guidance scale is an input of the model: there is no unconditional side to keep."""
    trainer = trainer_of("dpo", tmp_path, pairs(4), pipeline=BUILD[name](), resolution=RESOLUTION[name], max_steps=1)
    expected = 0.0 if name in ("FluxPipeline", "Flux2Pipeline") else 0.2
    assert trainer.args.proportion_empty_prompts == expected
    assert {builder.proportion_empty_prompts for builder in trainer.example_builders} == {expected}
    trainer.create_model_card()
    assert f"| empty prompts | {expected} |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(("options", "expected"), [({}, 0.2), ({"proportion_empty_prompts": 0.0}, 0.0)])
def test_empty_prompts_of_flux_without_embedded_guidance(tmp_path, options, expected):
    pipeline = tiny.tiny_flux(guidance_embeds=False)
    trainer = trainer_of("dpo", tmp_path, pairs(4), pipeline=pipeline, resolution=16, **options)
    assert trainer.args.proportion_empty_prompts == expected


def test_what_is_given_stays(tmp_path):
    trainer = trainer_of(
        "dpo", tmp_path, pairs(4), pipeline=tiny.tiny_flux(), resolution=16, proportion_empty_prompts=0.1
    )
    assert trainer.args.proportion_empty_prompts == 0.1


# ---- IPO's beta -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_the_default_of_beta(tmp_path, loss_type):
    assert DiffusionDPOConfig(str(tmp_path), use_cpu=True, loss_type=loss_type).beta == 2000.0


def test_ipo_needs_a_beta(tmp_path):
    with pytest.raises(ValueError, match=r"`loss_type='ipo'` needs a `beta`, found none: .* 1 / \(2 \* beta\)"):
        DiffusionDPOConfig(str(tmp_path), use_cpu=True, loss_type="ipo")
    assert DiffusionDPOConfig(str(tmp_path), use_cpu=True, loss_type="ipo", beta=500.0).beta == 500.0


@pytest.mark.parametrize(("loss_type", "slope"), [("sigmoid", 500.0), ("hinge", 2000.0), ("ipo", 0.0005)])
def test_slopes_at_the_start(loss_type, slope):
    """What the docs say of a beta of 2000."""
    margin = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    dpo_loss(margin, torch.zeros_like(margin), beta=2000.0, loss_type=loss_type).backward()
    assert -margin.grad.item() == pytest.approx(slope, rel=1e-9)


# ---- The weight of a winner's own loser -----------------------------------------------------------------------------


def test_a_small_own_weight_is_said_once(tmp_path):
    """The losers of other pairs then outweigh a winner's own."""
    with pytest.warns(UserWarning, match=r"own loser has 0\.\d+ of the weight.*windows of 4 pairs") as record:
        trainer = trained("rpo", tmp_path, embedder=embed, temperature=100.0, max_steps=3)
    assert len([w for w in record if "own loser" in str(w.message)]) == 1
    shares = [e["contrast/diagonal_weight"] for e in trainer.state.log_history if "loss" in e]
    assert all(share == pytest.approx(0.25, abs=0.01) for share in shares)


@pytest.mark.parametrize("options", [{"temperature": 0.001}, {"diagonal": "exclude"}, {"diagonal": 0.3}], ids=str)
def test_an_own_weight_that_is_large_or_asked_for(tmp_path, recwarn, options):
    trainer = trainer_of("rpo", tmp_path, pairs(4), embedder=lambda images, prompts: one_hot(images), **options)
    trainer.train()
    assert not [w for w in recwarn if "own loser" in str(w.message)]


def one_hot(images):
    """Winner and loser of a pair alike, and unlike all others: `embed_pairs` asks for chosen, then for rejected."""
    return torch.eye(len(images), 8)
