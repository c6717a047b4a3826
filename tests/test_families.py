"""Every model family against its own pipeline, and with every trainer."""

import functools
import inspect
import json
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DEISMultistepScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    HeliosScheduler,
    IPNDMScheduler,
    LCMScheduler,
    SASolverScheduler,
    SCMScheduler,
    StableDiffusionPipeline,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from diffusers.training_utils import compute_density_for_timestep_sampling
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image as PILImage

from tests import tiny
from tests.conftest import pairs, picture
from tests.methods import METHODS, make_trainer
from trl_diffusion import DiffusionSFTConfig, families
from trl_diffusion.callbacks import sample_rows
from trl_diffusion.card import model_card
from trl_diffusion.cli import main
from trl_diffusion.data.draws import Draws, ExampleKey
from trl_diffusion.data.images import ImageTransform
from trl_diffusion.export import export_lora, export_merged, load_merged
from trl_diffusion.families import FAMILIES, family_of, resolve_model
from trl_diffusion.families.base import DDPMFamily, FlowFamily
from trl_diffusion.families.flux2 import Flux2
from trl_diffusion.hub import load_trained, save_policy
from trl_diffusion.likelihood import (
    ELBO_BOUND,
    PREDICTION_TYPES,
    WEIGHTINGS,
    DDPMProcess,
    FlowProcess,
    TimestepSampling,
)


BUILD = {
    "StableDiffusionPipeline": tiny.tiny_stable_diffusion,
    "StableDiffusionXLPipeline": tiny.tiny_stable_diffusion_xl,
    "PixArtSigmaPipeline": tiny.tiny_pixart_sigma,
    "StableDiffusion3Pipeline": tiny.tiny_stable_diffusion_3,
    "FluxPipeline": tiny.tiny_flux,
    "Flux2Pipeline": tiny.tiny_flux2,
    "Flux2KleinPipeline": tiny.tiny_flux2_klein,
    "SanaPipeline": tiny.tiny_sana,
    "QwenImagePipeline": tiny.tiny_qwen_image,
    "ZImagePipeline": tiny.tiny_z_image,
}
# How to call the pipeline without classifier-free guidance, which doubles the batch.
UNGUIDED = {
    "StableDiffusionPipeline": {"guidance_scale": 1.0},
    "StableDiffusionXLPipeline": {"guidance_scale": 1.0},
    "PixArtSigmaPipeline": {"guidance_scale": 1.0, "use_resolution_binning": False},
    "StableDiffusion3Pipeline": {"guidance_scale": 1.0},
    "FluxPipeline": {},
    "Flux2Pipeline": {},
    "Flux2KleinPipeline": {"guidance_scale": 1.0},
    "SanaPipeline": {"guidance_scale": 1.0, "use_resolution_binning": False},
    "QwenImagePipeline": {},
    "ZImagePipeline": {"guidance_scale": 0.0},
}
DDPM = ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "PixArtSigmaPipeline"]
FLOW = [name for name in BUILD if name not in DDPM]
EVERY = pytest.mark.parametrize("name", BUILD)
PROMPTS = ["picture 1", "a red dog on green grass"]
# Of more tokens than any pipeline takes.
LONG_PROMPTS = ["a dog", "a red dog on green grass, " * 50]
RESOLUTION = {name: 32 if name == "SanaPipeline" else 16 for name in BUILD}
# What SDXL is told of an image that was made at this resolution.
SIZES = [16, 16, 0, 0, 16, 16]


def test_every_family_is_tested():
    assert [family.pipeline_class for family in FAMILIES] == list(BUILD)


def family(name: str, **options):
    pipeline = BUILD[name](**options)
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
    pipeline.set_progress_bar_config(disable=True)
    return family_of(pipeline)


def pixels(side: int) -> torch.Tensor:
    images = np.stack([np.array(picture(seed, (side, side))) for seed in range(2)])
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1


def conditioning(f, prompts: list[str], sizes: list[int] | None = None) -> dict[str, torch.Tensor]:
    encoded = f.encode_prompts(prompts, torch.device("cpu"))
    return encoded | ({"sizes": torch.tensor(sizes or SIZES).expand(len(prompts), -1)} if f.conditions_on_size else {})


def layout(f, latents: torch.Tensor) -> torch.Tensor:
    """Latents as the pipeline's own loop holds them."""
    if not f.packs_latents:
        return latents
    sizes = () if isinstance(f, Flux2) else latents.shape
    return f.pipeline._pack_latents(latents, *sizes)


def given(f, latents: torch.Tensor) -> torch.Tensor:
    """Latents as the pipeline takes them from its caller."""
    return latents if isinstance(f, Flux2) else layout(f, latents)


def leaves(value, path: str = "") -> Iterator[tuple[str, object]]:
    """Tensors and numbers in the arguments of a call, by their place."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(part, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from leaves(part, f"{path}[{i}]")
    elif isinstance(value, torch.Tensor) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        yield path, value


@contextmanager
def recorded(f):
    """The denoiser's calls, the answers that reach the scheduler, and what is decoded. The scheduler does nothing."""
    record = SimpleNamespace(calls=[], answers=[], decoded=[])
    signature = inspect.signature(type(f.denoiser).forward)

    def call(module, args, kwargs):
        bound = signature.bind(module, *args, **kwargs).arguments
        record.calls.append(dict(leaves({name: value for name, value in bound.items() if name != "self"})))

    def step(answer, timestep, latents, **kwargs):
        record.answers.append(answer)
        return (latents,)

    decode = f.pipeline.vae.decode

    def decoding(latents, **kwargs):
        record.decoded.append(latents)
        return decode(latents, **kwargs)

    hook = f.denoiser.register_forward_pre_hook(call, with_kwargs=True)
    f.pipeline.scheduler.step, f.pipeline.vae.decode = step, decoding
    try:
        with torch.no_grad():
            yield record
    finally:
        hook.remove()
        del f.pipeline.scheduler.step, f.pipeline.vae.decode


def assert_same_call(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        found = ours[name]
        if not isinstance(value, torch.Tensor):
            assert found == value, name
            continue
        if name == ".timestep":  # UNets take one for all images too
            value = value.expand(found.shape)
        assert found.dtype == value.dtype, name
        torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-6, msg=name)


# ---- The call -------------------------------------------------------------------------------------------------------


CALLS = [(name, {}, PROMPTS) for name in BUILD] + [
    ("StableDiffusion3Pipeline", {"t5": False}, PROMPTS),
    ("FluxPipeline", {"guidance_embeds": False}, PROMPTS),
    ("QwenImagePipeline", {}, ["a dog", "a cat"]),
    ("ZImagePipeline", {}, ["a dog", "a cat"]),
    *((name, {}, LONG_PROMPTS) for name in BUILD),
]


@pytest.mark.parametrize(("name", "options", "prompts"), CALLS, ids=lambda x: str(x) if isinstance(x, str) else "")
def test_the_denoiser_is_called_as_the_pipeline_calls_it(name, options, prompts):
    """At two steps of a sampling run: the same arguments, and the same answer to the scheduler. No square."""
    f, height, width = family(name, **options), RESOLUTION[name], 2 * RESOLUTION[name]
    x_t = torch.randn(len(prompts), *f.latent_shape(height, width), generator=torch.Generator().manual_seed(0))
    sizes = [height, width, 0, 0, height, width]
    with recorded(f) as theirs:
        f.pipeline(
            prompt=list(prompts),
            latents=given(f, x_t),
            height=height,
            width=width,
            num_inference_steps=2,
            output_type="latent",
            **UNGUIDED[name],
        )
    scheduler = f.pipeline.scheduler
    times = scheduler.sigmas if isinstance(f.process, FlowProcess) else scheduler.timesteps
    assert len(theirs.calls) == 2
    texts = list(prompts)
    with recorded(f) as ours:
        answers = [f.denoise(f.denoiser, x_t, t.expand(len(x_t)), conditioning(f, texts, sizes)) for t in times[:2]]
    assert texts == prompts
    for our_call, their_call, answer, their_answer in zip(
        ours.calls, theirs.calls, answers, theirs.answers, strict=True
    ):
        assert_same_call(our_call, their_call)
        assert answer.shape == x_t.shape
        torch.testing.assert_close(layout(f, answer), their_answer, rtol=1e-5, atol=1e-5)


@EVERY
def test_prompts_are_encoded_with_the_defaults_of_the_pipelines_call(name):
    """Number of tokens, cleaning, instructions: `encode_prompt` may have defaults of its own."""
    pipeline, seen = BUILD[name](), {}
    encode = pipeline.encode_prompt

    @functools.wraps(encode)
    def recorded(*args, **kwargs):
        bound = inspect.signature(encode).bind(*args, **kwargs)
        bound.apply_defaults()
        seen.update(bound.arguments)
        return encode(*args, **kwargs)

    pipeline.encode_prompt = recorded
    family_of(pipeline).encode_prompts(["a dog"], torch.device("cpu"))
    call = inspect.signature(type(pipeline).__call__).parameters
    shared = (seen.keys() & call.keys()) - {"prompt", "kwargs"}
    assert {option: seen[option] for option in shared} == {option: call[option].default for option in shared}


@EVERY
def test_a_prompt_means_the_same_in_any_batch(name):
    """Padding to the longest prompt and dropped prompts beside it change nothing."""
    f = family(name)
    x_t = torch.randn(
        3, *f.latent_shape(RESOLUTION[name], RESOLUTION[name]), generator=torch.Generator().manual_seed(0)
    )
    t = torch.tensor([300, 500, 700]) if isinstance(f.process, DDPMProcess) else torch.tensor([0.3, 0.5, 0.7])
    prompts = ["a dog", "", "a much longer prompt, about another dog"]
    with torch.no_grad():
        together = f.denoise(f.denoiser, x_t, t, conditioning(f, prompts))
        for i, prompt in enumerate(prompts):
            alone = f.denoise(f.denoiser, x_t[i : i + 1], t[i : i + 1], conditioning(f, [prompt]))
            torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "mask"), [("QwenImagePipeline", "encoder_hidden_states_mask"), ("ZImagePipeline", "mask")]
)
def test_behind_a_short_prompt_there_is_nothing(name, mask):
    """What is computed for one batch can be padded for another."""
    encoded = family(name).encode_prompts(["a dog", "a much longer prompt, about another dog"], torch.device("cpu"))
    (embeddings,) = [tensor for key, tensor in encoded.items() if key != mask]
    lengths = encoded[mask].sum(1)
    assert lengths[0] < lengths[1] == embeddings.shape[1]
    assert encoded[mask][0].bool().tolist() == (torch.arange(int(lengths[1])) < lengths[0]).tolist()
    assert not embeddings[0, lengths[0] :].any()
    assert embeddings[0, lengths[0] - 1].any()


@pytest.mark.parametrize("zeros", [True, False])
def test_a_dropped_prompt_of_sdxl_is_what_the_pipeline_guides_away_from(zeros):
    f = family("StableDiffusionXLPipeline")
    f.pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    _, negative, _, pooled = f.pipeline.encode_prompt(["x"], device="cpu", do_classifier_free_guidance=True)
    encoded = f.encode_prompts(["a dog", ""], torch.device("cpu"))
    torch.testing.assert_close(encoded["encoder_hidden_states"][1:], negative)
    torch.testing.assert_close(encoded["text_embeds"][1:], pooled)
    assert encoded["text_embeds"][0].any()


def test_a_dropped_prompt_of_sana_is_what_the_pipeline_guides_away_from():
    f = family("SanaPipeline")
    _, _, negative, mask = f.pipeline.encode_prompt(["x"], do_classifier_free_guidance=True, device="cpu")
    encoded = f.encode_prompts(["a dog", ""], torch.device("cpu"))
    torch.testing.assert_close(encoded["encoder_hidden_states"][1:], negative)
    assert torch.equal(encoded["encoder_attention_mask"][1:], mask)


def test_a_dropped_prompt_of_qwen_image_is_what_it_is_guided_away_from():
    f = family("QwenImagePipeline")
    negative = f.sampling_kwargs(guidance_scale=4.0)["negative_prompt"]
    encoded, wanted = (f.encode_prompts(prompts, torch.device("cpu")) for prompts in ([""], [negative]))
    torch.testing.assert_close(encoded, wanted, rtol=0, atol=0)


# ---- Sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"), [("QwenImagePipeline", {}), ("FluxPipeline", {"guidance_embeds": False})]
)
def test_a_negative_prompt_of_the_caller_is_kept(name, options):
    found = family(name, **options).sampling_kwargs(guidance_scale=4.0, negative_prompt="a dog")
    assert found == {"true_cfg_scale": 4.0, "negative_prompt": "a dog"}


def sampled(name: str, **options) -> list[np.ndarray]:
    """Two images of no square, with the library's options."""
    side = RESOLUTION[name]
    (images,) = sample_rows(options.pop("pipeline"), ["a dog"], [0, 1], height=side, width=2 * side, **options)
    return [np.array(image) for image in images]


def sampled_by_its_call(name: str, pipeline, **options) -> list[np.ndarray]:
    """The same, with the options of the pipeline's own call."""
    side, generators = RESOLUTION[name], [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    images = pipeline(prompt=["a dog"] * 2, height=side, width=2 * side, generator=generators, **options).images
    return [np.array(image) for image in images]


GUIDED = [(name, {}) for name in BUILD] + [("FluxPipeline", {"guidance_embeds": False})]


@pytest.mark.parametrize(("name", "options"), GUIDED, ids=str)
def test_the_guidance_scale_reaches_every_pipeline(name, options):
    """Whatever its call names it: 1 and 4 give other images, those of the call with the pipeline's own names."""
    pipeline, steps = family(name, **options).pipeline, {"num_inference_steps": 2}
    one, four = (sampled(name, pipeline=pipeline, guidance_scale=scale, **steps) for scale in (1.0, 4.0))
    assert all((a != b).any() for a, b in zip(one, four, strict=True))
    own = {"guidance_scale": 4.0}
    if name == "QwenImagePipeline":
        own = {"true_cfg_scale": 4.0, "negative_prompt": [" "] * 2}
    elif options:
        own = {"true_cfg_scale": 4.0, "negative_prompt": [""] * 2}
    elif name in ("PixArtSigmaPipeline", "SanaPipeline"):
        own |= {"use_resolution_binning": False}
    np.testing.assert_array_equal(four, sampled_by_its_call(name, pipeline, **own, **steps))
    # Without guidance: 1, but 0 for Z-Image, whose scale counts from there.
    none = 0.0 if name == "ZImagePipeline" else 1.0
    unguided = ({"guidance_scale": none} if "Flux" in name and not options else {}) | UNGUIDED[name]
    np.testing.assert_array_equal(
        sampled(name, pipeline=pipeline, guidance_scale=none, **steps),
        sampled_by_its_call(name, pipeline, **unguided, **steps),
    )


def test_a_guidance_scale_that_the_pipeline_would_ignore_is_refused():
    pipeline = tiny.tiny_flux2_klein()
    pipeline.register_to_config(is_distilled=True)
    with pytest.raises(ValueError, match=r"guidance_scale=4.0 .* is_distilled=True, which ignores it: leave it out"):
        sample_rows(pipeline, ["a dog"], [0], guidance_scale=4.0)
    assert family_of(pipeline).sampling_kwargs(guidance_scale=1.0, height=8) == {"guidance_scale": 1.0, "height": 8}


def test_a_pipeline_without_a_family_is_called_as_it_is():
    assert families.sampling_kwargs(DDPMPipeline, guidance_scale=3.0) == {"guidance_scale": 3.0}


@EVERY
def test_idle_parameters_are_known(name):
    """Distributed training waits for the gradient of every parameter unless it is told that some have none."""
    f = family(name)
    x_t = torch.randn(2, *f.latent_shape(RESOLUTION[name], RESOLUTION[name]))
    t = f.process.timesteps(torch.tensor([0.3, 0.7]))
    f.denoise(f.denoiser, x_t, t, conditioning(f, PROMPTS)).sum().backward()
    assert any(p.grad is None for p in f.denoiser.parameters()) == f.has_idle_parameters


# ---- Latents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BUILD, "StableDiffusionXLPipeline with statistics"])
def test_latents_are_what_the_pipeline_decodes(name):
    """What the VAE makes of the pixels comes back to it when the pipeline decodes the family's latents."""
    name, *statistics = name.split(" with ")
    f = family(name)
    if statistics:
        f.pipeline.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[1.5, 0.5, 2.0, 0.8])
    vae = f.pipeline.vae
    images, video = pixels(RESOLUTION[name]), name == "QwenImagePipeline"
    with torch.no_grad():
        encoded = vae.encode(images.unsqueeze(2) if video else images)
        noise = torch.randn(2, *f.latent_shape(RESOLUTION[name], RESOLUTION[name]))
        latents = f.encode_images(images).sample(noise)
    if name == "SanaPipeline":
        expected = encoded.latent
    elif isinstance(f, Flux2):
        expected = encoded.latent_dist.mode()
    else:
        expected = encoded.latent_dist.mean + encoded.latent_dist.std * (noise.unsqueeze(2) if video else noise)
    assert latents.shape == noise.shape
    assert latents.dtype == torch.float32
    with recorded(f) as record:
        f.pipeline(
            prompt=list(PROMPTS),
            latents=given(f, latents),
            height=RESOLUTION[name],
            width=RESOLUTION[name],
            num_inference_steps=2,
            output_type="pt",
            **UNGUIDED[name],
        )
    torch.testing.assert_close(record.decoded[0], expected, rtol=1e-5, atol=1e-5)


@EVERY
def test_resolutions(name):
    f = family(name)
    multiple = f.resolution_multiple()
    assert f.default_resolution() % multiple == 0
    assert f.scale_factor(f.pipeline.vae.config) * f.patch_size == multiple
    height, width = 4 * multiple, 6 * multiple
    shape = f.latent_shape(height, width)
    assert 2 * shape[2] == 3 * shape[1]
    with torch.no_grad():
        assert f.encode_images(torch.zeros(1, 3, height, width)).mean.shape == (1, *shape)


# ---- Parameterisations ----------------------------------------------------------------------------------------------


SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
T = torch.tensor([1, 50, 300, 600, 998])


def errors_of_a_predictor(p, prediction_type: str, t: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean squared errors of one and the same guess at x0, in every parameterisation, in float64."""
    generator = torch.Generator().manual_seed(0)
    x0, noise, off = (torch.randn(len(t), 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    guess = x0 + 0.1 * off
    a, s = (c.double() for c in p.coefficients(t, x0))
    noise_guess = (a * x0 + s * noise - a * guess) / s
    pairs_of = {
        "sample": (guess, x0),
        "epsilon": (noise_guess, noise),
        "v_prediction": (a * noise_guess - s * guess, a * noise - s * x0),
        "flow": (noise_guess - guess, noise - x0),
    }
    torch.testing.assert_close(p.target(x0, noise, t).double(), pairs_of[prediction_type][1])
    return {name: (one - two).square().flatten(1).mean(1) for name, (one, two) in pairs_of.items()}


@pytest.mark.parametrize("weighting", WEIGHTINGS[1:])
@pytest.mark.parametrize("zero_snr", [False, True], ids=["scaled linear", "zero terminal SNR"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_weighted_errors_do_not_depend_on_the_prediction(prediction_type, zero_snr, weighting):
    scheduler = DDIMScheduler(**SCHEDULE, prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr)
    p = DDPMProcess.from_scheduler(scheduler)
    assert (p.alphas_cumprod[-1] == 0) == zero_snr
    error = errors_of_a_predictor(p, prediction_type, T)
    alpha_bar = scheduler.alphas_cumprod.double()
    snr, snr_before = (a / (1 - a) for a in (alpha_bar[T], alpha_bar[T - 1]))
    factor = {
        "epsilon": torch.ones_like(snr),
        "min_snr": (5 / snr).clamp(max=1),
        "elbo": (500 * (snr_before / snr - 1)).clamp(max=ELBO_BOUND),
    }[weighting]
    weighted = p.weight(T, weighting).double() * error[prediction_type]
    tolerance = 1e-3 if weighting == "elbo" else 1e-5  # a difference of float32 numbers
    torch.testing.assert_close(weighted, factor * error["epsilon"], rtol=tolerance, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weighted_errors_of_a_flow(weighting):
    p = FlowProcess()
    t = torch.tensor([0.01, 0.2, 0.5, 0.8, 0.99])
    error = errors_of_a_predictor(p, "flow", t)
    torch.testing.assert_close(error["sample"], t.double() ** 2 * error["flow"], rtol=1e-5, atol=0)
    torch.testing.assert_close(error["epsilon"], (1 - t.double()) ** 2 * error["flow"], rtol=1e-5, atol=0)
    snr = ((1 - t.double()) / t.double()) ** 2
    expected = {
        "native": error["flow"],
        "epsilon": error["epsilon"],
        "min_snr": (5 / snr).clamp(max=1) * error["epsilon"],
        "elbo": (1 / (t * (1 - t))).double().clamp(max=ELBO_BOUND) * error["epsilon"],
    }[weighting]
    torch.testing.assert_close(p.weight(t, weighting).double() * error["flow"], expected, rtol=1e-5, atol=0)
    ends = p.timesteps(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.dtype == torch.float32
    assert p.weight(ends, weighting).isfinite().all()


def test_the_bound_of_a_schedule_tends_to_that_of_a_flow():
    """Both are -d log SNR / dt / 2: a DDPM schedule with the SNR of a flow has its weights, t counted in [0, 1]."""
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1001
    snr = ((1 - t) / t) ** 2
    p = DDPMProcess((snr / (1 + snr)).float(), "epsilon")
    steps = torch.arange(200, 800)
    torch.testing.assert_close(
        p.weight(steps, "elbo"),
        FlowProcess().weight(t[steps].float(), "elbo") / (1 - t[steps].float()) ** 2,
        rtol=1e-2,
        atol=0,
    )


# ---- Timesteps ------------------------------------------------------------------------------------------------------


GRID = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000


def test_uniform_timesteps_are_the_draws_themselves():
    assert torch.equal(TimestepSampling()(GRID), GRID)


@pytest.mark.parametrize(
    "options",
    [
        {"distribution": "uniform"},
        {"distribution": "logit_normal"},
        {"distribution": "logit_normal", "logit_mean": 0.7, "logit_std": 0.5},
        {"distribution": "mode"},
        {"distribution": "mode", "mode_scale": -0.5},
    ],
    ids=str,
)
def test_distributions_are_those_of_diffusers(options):
    torch.manual_seed(0)
    sampling = TimestepSampling(**options)
    ours = sampling(GRID)
    theirs = compute_density_for_timestep_sampling(
        sampling.distribution, 200_000, sampling.logit_mean, sampling.logit_std, sampling.mode_scale
    )
    assert (ours.diff() > 0).all()
    for q in (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
        assert ours[int(q * len(ours))].item() == pytest.approx(np.quantile(theirs.numpy(), q), abs=0.01)


def test_logit_normal_quantiles_are_exact():
    s = TimestepSampling("logit_normal", logit_mean=0.5, logit_std=2.0)(GRID)
    torch.testing.assert_close(torch.special.ndtr((torch.logit(s) - 0.5) / 2), GRID)


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal", "mode"])
def test_timesteps_stay_in_their_range(distribution):
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    s = TimestepSampling(distribution, shift=3.0, min_timestep=0.2, max_timestep=0.6)(torch.cat([ends, GRID]))
    assert s.min() >= 0.2
    assert s.max() <= 0.6
    assert s.min() == pytest.approx(0.2, abs=1e-3)
    assert s.max() == pytest.approx(0.6, abs=1e-3)
    whole = TimestepSampling(distribution)(ends)
    assert DDPMProcess(torch.linspace(1, 0, 1000), "epsilon").timesteps(whole).tolist() == [0, 999]
    sigmas = FlowProcess().timesteps(whole)
    assert 0 < sigmas.min() < sigmas.max() < 1


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 64)])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", FLOW)
def test_the_shift_is_the_pipelines(name, dynamic, height, width):
    """The levels that the pipeline samples at are a shifted row of levels."""
    if name == "SanaPipeline" and dynamic:
        pytest.skip("its pipeline cannot shift dynamically")
    pipeline = BUILD[name]()
    for kind in ("exponential", "linear"):
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(
            shift=2.5, use_dynamic_shifting=dynamic, base_shift=0.4, max_shift=3.0, time_shift_type=kind
        )
        f = family_of(pipeline)
        sigmas = [0.9, 0.6, 0.3, 0.1]
        f.num_inference_steps = len(sigmas)  # which FLUX.2 alone looks at
        with recorded(f):
            pipeline(
                prompt="a dog",
                height=height,
                width=width,
                sigmas=sigmas,
                num_inference_steps=4,
                output_type="latent",
                **UNGUIDED[name],
            )
        ours = TimestepSampling(shift=f.timestep_shift(height, width))(torch.tensor(sigmas))
        torch.testing.assert_close(ours, pipeline.scheduler.sigmas[:-1], rtol=1e-5, atol=1e-6)


def test_the_shift_of_a_solver_with_flow_prediction():
    pipeline = tiny.tiny_sana()
    pipeline.scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    f = family_of(pipeline)
    pipeline.scheduler.set_timesteps(10)
    levels = torch.linspace(0, 0.999, 11).flip(0)[:-1]
    torch.testing.assert_close(
        TimestepSampling(shift=f.timestep_shift(16, 16))(levels), pipeline.scheduler.sigmas[:-1], rtol=1e-5, atol=1e-6
    )


# ---- Sizes ----------------------------------------------------------------------------------------------------------


def test_sizes_tell_what_was_done_to_an_image():
    """Of 60 x 40 pixels, halved, then cut to 20 x 20: original, crop and target, heights before widths."""
    gradient = PILImage.fromarray(np.tile(np.linspace(0, 255, 60, dtype=np.uint8)[None, :, None], (40, 1, 3)))
    draws = Draws(0, ExampleKey(0))
    assert ImageTransform(20, 20).with_sizes(gradient, draws)[1] == [40, 60, 0, 5, 20, 20]
    assert ImageTransform(16, 16).with_sizes(picture(0), draws)[1] == [16, 16, 0, 0, 16, 16]
    lefts, flipped = set(), set()
    for row in range(20):
        draws = Draws(0, ExampleKey(row))
        plain, sizes = ImageTransform(20, 20, center_crop=False).with_sizes(gradient, draws)
        mirrored, sizes_mirrored = ImageTransform(20, 20, center_crop=False, random_flip=True).with_sizes(
            gradient, draws
        )
        lefts.add(sizes[3])
        # The brightness of the gradient tells the place of the crop.
        assert (plain[0, 0, 0].item() + 1) / 2 * 30 == pytest.approx(sizes[3], abs=1)
        flip = not torch.equal(plain, mirrored)
        flipped.add(flip)
        assert sizes_mirrored == [40, 60, 0, 10 - sizes[3] if flip else sizes[3], 20, 20]
    assert len(lefts) > 3
    assert flipped == {True, False}


# ---- Training -------------------------------------------------------------------------------------------------------


LORA = LoraConfig(r=4, lora_alpha=8)


def shorten_prompts(pipeline) -> None:
    """The 512 tokens of FLUX.2 would take most of a training's time."""
    if isinstance(pipeline, Flux2Pipeline | Flux2KleinPipeline):
        encode = pipeline.encode_prompt
        pipeline.encode_prompt = lambda *args, **kwargs: encode(*args, **kwargs | {"max_sequence_length": 48})


def trainer_of(folder, pipeline, method: str, peft_config=None, dataset=None, **changes):
    shorten_prompts(pipeline)
    settings = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "resolution": RESOLUTION.get(type(pipeline).__name__, 16),
        "proportion_empty_prompts": 0.3,
    }
    dataset = METHODS[method].data(4) if dataset is None else dataset
    return make_trainer(method, pipeline, folder, dataset, peft_config=peft_config, **settings | changes)


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def answer(pipeline) -> torch.Tensor:
    f = family_of(pipeline)
    f.denoiser.eval()
    shorten_prompts(pipeline)
    x_t = torch.randn(
        2,
        *f.latent_shape(RESOLUTION[f.pipeline_class], RESOLUTION[f.pipeline_class]),
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        t = f.process.timesteps(torch.tensor([0.3, 0.7]))
        return f.denoise(f.denoiser, x_t, t, conditioning(f, PROMPTS))


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
@EVERY
def test_training(tmp_path, name, method, peft_config):
    """The start is exact, the weights load into the pipeline, and a resumed run is the same to the last bit."""
    options = {"peft_config": peft_config, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(tmp_path / "whole", BUILD[name](), method, **options)
    trainer.train()
    start = {"kto": 0.5, "rpo": np.float32(math.log(2)), "dpo": np.float32(math.log(2))}
    if method in start:
        first = trainer.state.log_history[0]
        assert first["loss"] == start[method]
        for side in {"chosen", "rejected"} & {entry.removeprefix("errors/") for entry in first}:
            assert first[f"errors/{side}"] == first[f"ref_errors/{side}"]
            assert first[f"rewards/{side}"] == 0.0
    losses = logged(trainer, "loss")
    assert len(set(losses)) > 1
    assert len(losses) == 3

    trainer.save_model()
    if peft_config is None:
        loaded = type(trainer.pipeline).from_pretrained(trainer.args.output_dir)
    else:
        loaded = BUILD[name]()
        if trainer.family.loads_lora:
            loaded.load_lora_weights(trainer.args.output_dir)
        else:
            assert not (tmp_path / "whole" / "pytorch_lora_weights.safetensors").exists()
            PeftModel.from_pretrained(family_of(loaded).denoiser, trainer.args.output_dir)
    assert type(loaded).__name__ == name
    trained = answer(trainer.pipeline)
    torch.testing.assert_close(answer(loaded), trained, rtol=0, atol=0)
    assert not torch.equal(trained, answer(BUILD[name]()))

    resumed = trainer_of(tmp_path / "resumed", BUILD[name](), method, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(resumed, "loss") == losses
    assert torch.equal(answer(resumed.pipeline), trained)

    before, after = overfit(trainer_of(tmp_path / "overfit", BUILD[name](), method, peft_config))
    assert after < before


def overfit(trainer, steps: int = 8) -> tuple[float, float]:
    """The loss of one batch, noise and timesteps included, before and after some steps on it alone."""
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    noised, ref_errors = trainer.corrupt(inputs), None
    if trainer.reference is not None:
        ref_errors = trainer.reference_errors(trainer.model, noised)
    inputs |= {"noised": noised, "ref_errors": ref_errors}
    optimizer = torch.optim.Adam([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(steps + 1):
        loss = trainer.compute_loss(trainer.model, inputs)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[0], losses[-1]


def test_the_noises_error_is_the_same_of_a_model_of_the_noise_and_of_v(tmp_path):
    """`weighting="epsilon"`: the losses of a whole training, of one model, told apart by what it answers."""
    losses = {}
    for prediction_type in ("epsilon", "v_prediction"):
        trainer = trainer_of(
            tmp_path, tiny.tiny_stable_diffusion(prediction_type), "sft", weighting="epsilon", optim="sgd"
        )
        f = trainer.family
        denoise = f.denoise

        def as_v(model, x_t, t, conditioning, denoise=denoise, process=f.process):
            a, s = process.coefficients(t, x_t)
            return (denoise(model, x_t, t, conditioning) - s * x_t) / a

        if prediction_type == "v_prediction":
            f.denoise = as_v
        trainer.train()
        losses[prediction_type] = logged(trainer, "loss")
    np.testing.assert_allclose(losses["epsilon"], losses["v_prediction"], rtol=1e-4)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])
def test_timestep_options_reach_the_noise(tmp_path, name):
    trainer = trainer_of(tmp_path, BUILD[name](), "sft", timestep_sampling="mode", min_timestep=0.25, max_timestep=0.5)
    batch = next(iter(trainer.get_train_dataloader()))
    t = trainer.corrupt(batch).t
    shift = trainer.family.timestep_shift(RESOLUTION[name], RESOLUTION[name])
    s = TimestepSampling("mode", shift=shift, min_timestep=0.25, max_timestep=0.5)(batch["timestep"])
    assert torch.equal(t, trainer.family.process.timesteps(s))
    assert [sampling.shift for sampling in trainer.timestep_sampling.values()] == [shift]
    (default,) = trainer_of(tmp_path, BUILD[name](), "sft").timestep_sampling.values()
    assert default.distribution == ("uniform" if name == "StableDiffusionPipeline" else "logit_normal")


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_zero_terminal_snr(tmp_path, name, prediction_type):
    pipeline = BUILD[name]()
    pipeline.scheduler = DDIMScheduler(**SCHEDULE, prediction_type=prediction_type, rescale_betas_zero_snr=True)
    trainer = trainer_of(tmp_path, pipeline, "dpo", min_timestep=0.999, peft_config=LORA)
    noised = trainer.corrupt(next(iter(trainer.get_train_dataloader())))
    assert noised.t.tolist() == [999] * 4
    trainer.train()
    assert all(map(math.isfinite, logged(trainer, "loss")))


@pytest.mark.parametrize("size_conditioning", ["real", "fixed"])
def test_sizes_reach_the_denoiser(tmp_path, size_conditioning):
    data = pairs(4).map(lambda row: row)
    rows = [{**row, "chosen": picture(i, (48, 32)), "rejected": picture(i, (16, 20))} for i, row in enumerate(data)]
    trainer = trainer_of(
        tmp_path,
        tiny.tiny_stable_diffusion_xl(),
        "dpo",
        dataset=type(data).from_list(rows, features=data.features),
        size_conditioning=size_conditioning,
    )
    seen = []
    trainer.family.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    noised = trainer.corrupt(next(iter(trainer.get_train_dataloader())))
    trainer.errors(trainer.model, noised)
    chosen, rejected = (
        ([32, 48, 0, 4, 16, 16], [20, 16, 2, 0, 16, 16]) if size_conditioning == "real" else (SIZES, SIZES)
    )
    assert seen[0].tolist() == [chosen, chosen, rejected, rejected]


# ---- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestep_sampling": "beta"}, r"`timestep_sampling` must be one of .*'mode'.* found 'beta'"),
        (
            {"timestep_sampling": "uniform", "logit_mean": 0.5},
            r"`logit_mean=0.5` belongs to .*'logit_normal'.*'uniform'",
        ),
        ({"timestep_sampling": "mode", "logit_std": 2.0}, r"`logit_std=2.0` belongs to .*'logit_normal'.*'mode'"),
        ({"timestep_sampling": "logit_normal", "mode_scale": 1.0}, r"`mode_scale=1.0` belongs to .*'mode'"),
        ({"timestep_sampling": "logit_normal", "logit_std": 0.0}, r"logit_std=0.0, expected finite numbers"),
        ({"timestep_sampling": "logit_normal", "logit_mean": math.inf}, r"logit_mean=inf .* expected finite numbers"),
        ({"timestep_sampling": "mode", "mode_scale": 1.8}, r"`mode_scale` must be between -1 .* found 1.8"),
        ({"min_timestep": 0.5, "max_timestep": 0.5}, r"min_timestep=0.5 and max_timestep=0.5, expected fractions"),
        ({"max_timestep": 1.5}, r"max_timestep=1.5, expected fractions"),
        ({"size_conditioning": "none"}, r"`size_conditioning` must be one of .* found 'none'"),
        ({"weighting": "p2"}, r"`weighting` must be one of .*'elbo'.* found 'p2'"),
    ],
)
def test_configurations_that_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionSFTConfig(str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("StableDiffusionPipeline", {"logit_std": 0.5}, r"`logit_std=0.5` belongs to .*'logit_normal'.*'uniform'"),
        (
            "StableDiffusionPipeline",
            {"size_conditioning": "fixed"},
            r"SDXL is; found a StableDiffusionPipeline: leave",
        ),
        ("FluxPipeline", {"mode_scale": 0.5}, r"`mode_scale=0.5` belongs to .*'mode'.* found 'logit_normal'"),
        ("FluxPipeline", {"resolution": 18}, r"expected a multiple of 4 for a FluxPipeline: use 16 or 20"),
    ],
)
def test_options_that_the_family_has_no_use_for(tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, BUILD[name](), "sft", **options)


@EVERY
def test_what_no_family_trains(name):
    pipeline = BUILD[name]()
    f = family_of(pipeline)
    for component in (f.denoiser_name, *f.components):
        part = getattr(pipeline, component)
        setattr(pipeline, component, None)
        with pytest.raises(ValueError, match=rf"Found a {name} without {component}|refiner"):
            family_of(pipeline).check_trainable()
        setattr(pipeline, component, part)
    in_channels = f.denoiser.config.in_channels
    f.denoiser.register_to_config(in_channels=2 * in_channels + 1)
    with pytest.raises(
        ValueError, match=rf"{2 * in_channels + 1} input channels over a VAE with 4: expected a text-to-"
    ):
        family_of(pipeline).check_trainable()
    f.denoiser.register_to_config(in_channels=in_channels)
    if name in FLOW:
        pipeline.scheduler = DDPMScheduler()
        message = r"Found DDPMScheduler with prediction_type='epsilon'; expected a flow-matching scheduler"
    else:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
        message = r"Found FlowMatchEulerDiscreteScheduler .* expected a DDPM-like scheduler"
    with pytest.raises(ValueError, match=message):
        family_of(pipeline).check_trainable()


FLOW_SOLVERS = [
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
]


@pytest.mark.parametrize("scheduler_class", FLOW_SOLVERS)
def test_solvers_of_a_flow_need_its_noise_levels(scheduler_class):
    """Without `use_flow_sigmas` they sample along the path of DDPM, whatever the denoiser predicts."""
    for use_flow_sigmas in (True, False):
        scheduler = scheduler_class(prediction_type="flow_prediction", use_flow_sigmas=use_flow_sigmas, flow_shift=3.0)
        scheduler.set_timesteps(10)
        t = scheduler.sigmas[4:5]
        theirs, ours = scheduler._sigma_to_alpha_sigma_t(t), FlowProcess().coefficients(t, t)
        assert all(map(torch.allclose, theirs, ours)) == use_flow_sigmas
        if use_flow_sigmas:
            FlowProcess.from_scheduler(scheduler)
        else:
            with pytest.raises(ValueError, match=r"use_flow_sigmas=False, .* another path .* set `use_flow_sigmas=Tr"):
                FlowProcess.from_scheduler(scheduler)
    with pytest.raises(ValueError, match=r"with use_flow_sigmas=True; expected a DDPM-like scheduler"):
        DDPMProcess.from_scheduler(scheduler_class(prediction_type="epsilon", use_flow_sigmas=True))


@pytest.mark.parametrize(
    ("process", "scheduler", "problem"),
    [
        (DDPMProcess, EDMDPMSolverMultistepScheduler(), "without `alphas_cumprod`"),
        (DDPMProcess, EDMEulerScheduler(), "without `alphas_cumprod`"),
        (DDPMProcess, IPNDMScheduler(), "without `alphas_cumprod`"),
        (DDPMProcess, FlowMatchEulerDiscreteScheduler(), "without `alphas_cumprod`"),
        (DDPMProcess, UniPCMultistepScheduler(prediction_type="flow_prediction"), "prediction_type='flow_prediction'"),
        (
            DDPMProcess,
            EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
            "timestep_type='continuous'",
        ),
        (FlowProcess, FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas=True"),
        (FlowProcess, DDIMScheduler(), "prediction_type='epsilon'"),
        (FlowProcess, DPMSolverMultistepScheduler(use_flow_sigmas=True), "prediction_type='epsilon'"),
        (FlowProcess, EDMEulerScheduler(), "prediction_type='epsilon'"),
        (FlowProcess, HeliosScheduler(), "prediction_type='flow_prediction'"),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, str) else "",
)
def test_noise_that_is_not_the_processs_is_named(process, scheduler, problem):
    """And nobody is told to exchange the scheduler: the denoiser knows one kind of noise."""
    with pytest.raises(ValueError) as error:
        process.from_scheduler(scheduler)
    message = str(error.value)
    assert message.startswith(f"Found {type(scheduler).__name__} with")
    assert problem in message
    assert re.search("expected a (DDPM-like|flow-matching) scheduler", message)
    assert "published with" in message
    assert "from_config" not in message


@pytest.mark.parametrize("scheduler_class", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_flow_schedulers_are_known(scheduler_class):
    FlowProcess.from_scheduler(scheduler_class(shift=3.0))


def test_the_refiner_is_refused():
    pipeline = tiny.tiny_stable_diffusion_xl()
    pipeline.text_encoder = None
    with pytest.raises(ValueError, match=r"second text encoder only, as the refiner has it"):
        family_of(pipeline).check_trainable()
    pipeline = tiny.tiny_stable_diffusion_xl()
    pipeline.unet.add_embedding.linear_1 = torch.nn.Linear(5 * 8 + 16, 64)
    with pytest.raises(ValueError, match=r"told 5 numbers about an image's size, expected 6"):
        family_of(pipeline).check_trainable()


def test_a_vae_that_would_overflow_is_refused():
    pipeline = tiny.tiny_stable_diffusion_xl()
    pipeline.vae.half()
    with pytest.raises(ValueError, match=r"VAE in float16, in which it overflows"):
        family_of(pipeline).check_trainable()
    pipeline.vae.register_to_config(force_upcast=False)
    family_of(pipeline).check_trainable()


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        ("StableDiffusionPipeline", "time_cond_proj_dim", 256, r"as latent consistency models are"),
        ("StableDiffusionXLPipeline", "time_cond_proj_dim", 256, r"as latent consistency models are"),
        ("SanaPipeline", "guidance_embeds", True, r"as SANA-Sprint has it"),
        (
            "PixArtSigmaPipeline",
            "use_additional_conditions",
            True,
            r"told size and aspect ratio, as PixArt-Alpha has it",
        ),
        ("QwenImagePipeline", "guidance_embeds", True, r"guidance_embeds=True, which the QwenImagePipeline"),
        ("QwenImagePipeline", "zero_cond_t", True, r"zero_cond_t=True, which the QwenImagePipeline"),
    ],
)
def test_models_that_the_pipeline_cannot_call_are_refused(name, option, value, message):
    pipeline = BUILD[name]()
    family_of(pipeline).denoiser.register_to_config(**{option: value})
    with pytest.raises(ValueError, match=message):
        family_of(pipeline).check_trainable()


def test_a_distilled_klein_is_refused():
    pipeline = tiny.tiny_flux2_klein()
    pipeline.register_to_config(is_distilled=True)
    with pytest.raises(ValueError, match=r"is_distilled=True, which is distilled to few steps"):
        family_of(pipeline).check_trainable()


@pytest.mark.parametrize(
    ("name", "part", "option", "value", "message"),
    [
        ("StableDiffusionPipeline", "unet", "out_channels", 8, r"8 output channels over 4 of input, expected 4"),
        ("StableDiffusionXLPipeline", "unet", "out_channels", 8, r"8 output channels over 4 of input, expected 4"),
        ("PixArtSigmaPipeline", "transformer", "out_channels", 12, r"12 output channels over 4 of input, expected 8"),
        ("StableDiffusion3Pipeline", "transformer", "out_channels", 8, r"8 output channels over 4 of input"),
        ("FluxPipeline", "transformer", "out_channels", 32, r"32 output channels over 16 of input, expected 16"),
        ("Flux2Pipeline", "transformer", "out_channels", 32, r"32 output channels over 16 of input, expected 16"),
        ("SanaPipeline", "transformer", "out_channels", 8, r"8 output channels over 4 of input, expected 4"),
        ("QwenImagePipeline", "transformer", "out_channels", 8, r"8 output channels over 16 of input, expected 4"),
        ("StableDiffusionPipeline", "vae", "scaling_factor", None, r"VAE with scaling_factor=None, without which a"),
        ("StableDiffusion3Pipeline", "vae", "shift_factor", None, r"VAE with shift_factor=None, without which a St"),
        ("FluxPipeline", "vae", "shift_factor", None, r"VAE with shift_factor=None, without which a FluxPipeline"),
        ("ZImagePipeline", "vae", "shift_factor", None, r"VAE with shift_factor=None, without which a ZImagePipe"),
        ("SanaPipeline", "vae", "scaling_factor", None, r"VAE with scaling_factor=None, without which a SanaPipe"),
        ("QwenImagePipeline", "vae", "latents_mean", None, r"VAE with latents_mean=None, without which a QwenIma"),
        ("QwenImagePipeline", "vae", "latents_std", None, r"VAE with latents_std=None, without which a QwenImag"),
        ("StableDiffusionXLPipeline", "unet", "addition_embed_type", None, r"addition_embed_type=None, expected 'te"),
    ],
)
def test_configurations_that_no_training_understands(name, part, option, value, message):
    pipeline = BUILD[name]()
    getattr(pipeline, part).register_to_config(**{option: value})
    with pytest.raises(ValueError, match=message):
        resolve_model(pipeline)


def test_pixart_may_predict_a_variance_or_not():
    for out_channels in (4, 8):
        pipeline = tiny.tiny_pixart_sigma()
        pipeline.transformer.register_to_config(out_channels=out_channels)
        resolve_model(pipeline)


class Unshifted(FlowFamily):
    """As AuraFlow, whose VAE has a shift_factor of None, which its pipeline does not look at."""

    pipeline_class = "UnshiftedPipeline"
    denoiser_class = "SD3Transformer2DModel"

    def encode_prompts(self, prompts, device):
        raise NotImplementedError

    def denoise(self, model, x_t, t, conditioning):
        raise NotImplementedError


def test_a_vae_without_a_shift():
    pipeline = tiny.tiny_stable_diffusion_3()
    pipeline.vae.register_to_config(shift_factor=None)
    f = Unshifted(pipeline)
    f.check_trainable()
    with torch.no_grad():
        mean = pipeline.vae.encode(pixels(16)).latent_dist.mean
        torch.testing.assert_close(f.encode_images(pixels(16)).mean, mean * pipeline.vae.config.scaling_factor)


@EVERY
def test_a_tiny_vae_is_refused(name):
    """It has no posterior, and only approximates the latents."""
    pipeline = BUILD[name]()
    pipeline.vae = AutoencoderTiny(latent_channels=4)
    with pytest.raises(ValueError, match=rf"Found AutoencoderTiny as the VAE of a {name}, expected Autoencoder"):
        resolve_model(pipeline)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("StableDiffusionPipeline", LCMScheduler()),
        ("StableDiffusionXLPipeline", TCDScheduler()),
        ("PixArtSigmaPipeline", LCMScheduler()),
        ("SanaPipeline", SCMScheduler()),
        ("FluxPipeline", FlowMatchLCMScheduler()),
        ("QwenImagePipeline", FlowMapEulerDiscreteScheduler()),
    ],
)
def test_schedulers_of_few_step_models_are_refused(name, scheduler):
    pipeline = BUILD[name]()
    pipeline.scheduler = scheduler
    with pytest.raises(
        ValueError, match=rf"Found a {name} with {type(scheduler).__name__}, .* distilled to few steps"
    ):
        resolve_model(pipeline)


TRAILING = SCHEDULE | {"timestep_spacing": "trailing"}
STATIC = {"use_dynamic_shifting": False}
# The published schedulers of few-step models, and of base models that are like them (docs/families.md).
SIGNS = [
    ("StableDiffusionPipeline", {}, EulerDiscreteScheduler(**TRAILING), True),  # SD-Turbo
    ("StableDiffusionXLPipeline", {}, EulerAncestralDiscreteScheduler(**TRAILING), True),  # SDXL-Turbo
    ("StableDiffusionXLPipeline", {}, EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading"), False),
    (
        "StableDiffusionXLPipeline",
        {"prediction_type": "v_prediction"},
        EulerDiscreteScheduler(**TRAILING, prediction_type="v_prediction", rescale_betas_zero_snr=True),
        False,
    ),
    ("FluxPipeline", {"guidance_embeds": False}, FlowMatchEulerDiscreteScheduler(shift=1.0, **STATIC), True),
    ("FluxPipeline", {"guidance_embeds": True}, FlowMatchEulerDiscreteScheduler(shift=1.0, **STATIC), False),
    (
        "FluxPipeline",
        {"guidance_embeds": False},
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        False,
    ),
    ("ZImagePipeline", {}, FlowMatchEulerDiscreteScheduler(shift=3.0, **STATIC), True),
    ("ZImagePipeline", {}, FlowMatchEulerDiscreteScheduler(shift=6.0, **STATIC), False),
    ("StableDiffusion3Pipeline", {}, FlowMatchEulerDiscreteScheduler(shift=3.0, **STATIC), False),
]


@pytest.mark.parametrize(("name", "options", "scheduler", "is_sign"), SIGNS)
def test_signs_of_few_step_models_are_told(name, options, scheduler, is_sign):
    pipeline = BUILD[name](**options)
    pipeline.scheduler = scheduler
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resolve_model(pipeline)
    told = [str(w.message) for w in caught if "distilled" in str(w.message)]
    assert len(told) == is_sign
    if is_sign:
        assert told[0].startswith(f"Found a {name} ")


@EVERY
def test_our_pipelines_have_no_sign_of_a_few_step_model(name):
    assert family_of(BUILD[name]()).few_step_sign() is None


# ---- Before the weights are loaded ----------------------------------------------------------------------------------


def save_configs(pipeline, folder) -> None:
    """A pipeline's files without its weights."""
    f = family_of(pipeline)
    pipeline.save_config(folder)
    for part in (f.denoiser_name, "vae", "scheduler"):
        getattr(pipeline, part).save_config(folder / part)


def edit(file, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


class LoadsWeightsError(Exception):
    pass


@pytest.fixture
def no_weights(monkeypatch):
    def from_pretrained(*args, **kwargs):
        raise LoadsWeightsError

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)


@EVERY
def test_configuration_files_are_enough_to_refuse(tmp_path, no_weights, name):
    pipeline = BUILD[name]()
    f = family_of(pipeline)
    save_configs(pipeline, tmp_path)
    index, denoiser = tmp_path / "model_index.json", tmp_path / f.denoiser_name / "config.json"
    with pytest.raises(LoadsWeightsError):
        resolve_model(str(tmp_path))

    def refused(file, message, **changes):
        before = file.read_text()
        edit(file, **changes)
        with pytest.raises(ValueError, match=message):
            resolve_model(str(tmp_path))
        file.write_text(before)

    refused(
        index, r"class KandinskyPipeline, which no family handles.*'SanaPipeline'", _class_name="KandinskyPipeline"
    )
    refused(index, r"Found UNet3DConditionModel as", **{f.denoiser_name: ["diffusers", "UNet3DConditionModel"]})
    refused(index, r"Found AutoencoderTiny as the VAE", vae=["diffusers", "AutoencoderTiny"])
    refused(index, r"without scheduler, which", scheduler=[None, None])
    refused(index, r"with LCMScheduler, which is for", scheduler=["diffusers", "LCMScheduler"])
    refused(index, r"Found EDMEulerScheduler", scheduler=["diffusers", "EDMEulerScheduler"])
    refused(denoiser, r"3 input channels over a VAE with 4", in_channels=3)
    vae = json.loads((tmp_path / "vae" / "config.json").read_text())
    for option in set(f.vae_options) & vae.keys():
        refused(tmp_path / "vae" / "config.json", rf"VAE with {option}=None", **{option: None})
    if name == "Flux2KleinPipeline":
        refused(index, r"is_distilled=True", is_distilled=True)


@pytest.mark.parametrize("command", ["bench", "evaluate", "evaluate an adapter"])
def test_commands_that_train_check_before_they_load(tmp_path, no_weights, capsys, command):
    save_configs(tiny.tiny_stable_diffusion(), tmp_path / "model")
    edit(tmp_path / "model" / "model_index.json", _class_name="KandinskyPipeline")
    model = str(tmp_path / "model")
    options = ["--model_name_or_path", model]
    if command.startswith("evaluate"):
        (tmp_path / "data").mkdir()
        pairs(2).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
        data = ["--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
        options += ["--baseline_name_or_path", model, *data]
    if command.endswith("adapter"):
        (tmp_path / "adapter").mkdir()
        LoraConfig(base_model_name_or_path=model).save_pretrained(tmp_path / "adapter")
        options[1] = str(tmp_path / "adapter")
    for part in ("text_encoder", "tokenizer", "feature_extractor", "safety_checker", "image_encoder"):
        (tmp_path / "model" / part).mkdir(exist_ok=True)  # without files: weights are not looked for
    with pytest.raises(SystemExit):
        main([command.split()[0], *options])
    assert "class KandinskyPipeline, which no family handles" in capsys.readouterr().err.splitlines()[-1]


def test_parts_that_are_given_replace_those_of_the_files(tmp_path, no_weights):
    save_configs(tiny.tiny_stable_diffusion(), tmp_path)
    edit(
        tmp_path / "model_index.json",
        scheduler=["diffusers", "EDMEulerScheduler"],
        vae=["diffusers", "AutoencoderTiny"],
    )
    given = {"scheduler": DDIMScheduler(**SCHEDULE), "vae": tiny.tiny_vae()}
    with pytest.raises(LoadsWeightsError):
        resolve_model(str(tmp_path), model_init_kwargs=given)
    with pytest.raises(ValueError, match=r"Found EDMEulerScheduler without"):
        resolve_model(str(tmp_path), model_init_kwargs={"vae": given["vae"]})
    with pytest.raises(ValueError, match=r"without vae"):
        resolve_model(str(tmp_path), model_init_kwargs={"vae": None})


def test_classes_from_elsewhere_are_left_to_the_loading(tmp_path, no_weights):
    save_configs(tiny.tiny_stable_diffusion_xl(), tmp_path)
    for part in ("unet", "vae", "scheduler"):
        edit(tmp_path / "model_index.json", **{part: ["mine", "Mine"]})
        with pytest.raises(LoadsWeightsError):
            resolve_model(str(tmp_path))


def test_of_a_hub_id_only_configuration_files_are_read(tmp_path, no_weights, monkeypatch):
    save_configs(tiny.tiny_stable_diffusion_xl(), tmp_path)
    read = []

    def hf_hub_download(repo, filename, subfolder=None, **kwargs):
        read.append((repo, subfolder, filename, kwargs["revision"], kwargs["token"]))
        return str(tmp_path / (subfolder or "") / filename)

    monkeypatch.setattr(diffusers.configuration_utils, "hf_hub_download", hf_hub_download)
    which = {"revision": "v1", "token": "secret"}
    with pytest.raises(LoadsWeightsError):
        resolve_model("owner/model", model_init_kwargs=which | {"variant": "fp16", "dtype": "bfloat16"})
    assert sorted(read, key=str) == sorted(
        [
            ("owner/model", None, "model_index.json", "v1", "secret"),
            ("owner/model", "unet", "config.json", "v1", "secret"),
            ("owner/model", "vae", "config.json", "v1", "secret"),
            ("owner/model", "scheduler", "scheduler_config.json", "v1", "secret"),
        ],
        key=str,
    )
    read.clear()
    edit(tmp_path / "model_index.json", _class_name="StableDiffusionXLInpaintPipeline")
    with pytest.raises(ValueError, match=r"class StableDiffusionXLInpaintPipeline, which no family handles"):
        resolve_model("owner/model", model_init_kwargs=which)
    assert [filename for _, _, filename, *_ in read] == ["model_index.json"]


def test_a_single_file_is_no_pipeline(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"The file .*model.safetensors' is no diffusers pipeline.*from_single_file"):
        resolve_model(str(file))


def _klein(distilled: bool):
    pipeline = tiny.tiny_flux2_klein()
    pipeline.register_to_config(is_distilled=distilled)
    return pipeline


def _unknown_schedule():
    pipeline = tiny.tiny_stable_diffusion()
    pipeline.scheduler = EDMDPMSolverMultistepScheduler()
    return pipeline


@pytest.mark.parametrize(
    ("build", "dtype"),
    [
        (tiny.tiny_stable_diffusion_xl, "float16"),  # in which its VAE overflows
        (_unknown_schedule, "float32"),
        (functools.partial(_klein, True), "float32"),
    ],
)
def test_what_cannot_be_trained_still_takes_its_adapter(tmp_path, build, dtype):
    """Loading an adapter and merging it need the family's names, and nothing that training needs."""
    pipeline, base, adapter = build(), tmp_path / "base", tmp_path / "adapter"
    pipeline.save_pretrained(base)
    f = family_of(pipeline)
    policy = get_peft_model(f.denoiser, LoraConfig(r=2, target_modules=f.lora_targets))
    policy.peft_config["default"].base_model_name_or_path = str(base)
    adapter.mkdir()
    save_policy(policy, f, adapter)
    for load in (load_trained, load_merged):
        assert type(load(str(adapter), dtype=dtype)) is type(pipeline)
    with pytest.raises(ValueError, match=r"^Found "):
        resolve_model(str(base), model_init_kwargs={"dtype": dtype})


def test_a_lora_without_a_loader_is_no_file_of_diffusers(tmp_path):
    base = tmp_path / "base"
    tiny.tiny_pixart_sigma().save_pretrained(base)
    trainer = trainer_of(tmp_path / "run", str(base), "sft", LORA, resolution=16, max_steps=1)
    trainer.train()
    trainer.save_model()
    torch.testing.assert_close(answer(load_trained(str(tmp_path / "run"))), answer(trainer.pipeline), rtol=0, atol=0)
    assert "PeftModel.from_pretrained" in str(model_card(trainer))
    with pytest.raises(
        ValueError, match=r"LoRA of a PixArtSigmaPipeline, for which diffusers has no LoRA files: merge"
    ):
        export_lora(tmp_path / "run", tmp_path / "lora.safetensors", layout="diffusers")
    export_merged(tmp_path / "run", tmp_path / "merged")
    merged = type(trainer.pipeline).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(answer(merged), answer(trainer.pipeline), rtol=1e-4, atol=1e-5)


# ---- A family from elsewhere ----------------------------------------------------------------------------------------


class ToyPipeline(StableDiffusionPipeline):
    """A pipeline that diffusers does not know."""


class Toy(DDPMFamily):
    """The whole of a new family, as docs/families.md shows it."""

    pipeline_class = "ToyPipeline"
    denoiser_class = "UNet2DConditionModel"
    denoiser_name = "unet"

    def encode_prompts(self, prompts, device):
        embeddings, _ = self.pipeline.encode_prompt(prompts, device, 1, False)
        return {"encoder_hidden_states": embeddings}

    def denoise(self, model, x_t, t, conditioning):
        return model(x_t, t, **conditioning, return_dict=False)[0]


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", [*families.FAMILIES])
    families.FAMILIES.append(Toy)
    return ToyPipeline(**tiny.tiny_stable_diffusion().components, requires_safety_checker=False)


@pytest.mark.parametrize("method", METHODS)
def test_a_family_from_elsewhere(tmp_path, toy, method):
    """One class and one line: it trains as Stable Diffusion does, of which it is a copy."""
    losses = []
    for pipeline in (toy, tiny.tiny_stable_diffusion()):
        trainer = trainer_of(tmp_path / type(pipeline).__name__, pipeline, method, LORA, resolution=16)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert trainer.family.__class__ is not Toy
    assert losses[0] == losses[1]
    trainer.save_model()
    assert (tmp_path / "StableDiffusionPipeline" / "pytorch_lora_weights.safetensors").exists()


def test_a_family_that_was_not_added(toy, monkeypatch):
    families.FAMILIES.remove(Toy)
    with pytest.raises(ValueError, match=r"class ToyPipeline, which no family handles; expected one of \['Stable"):
        family_of(toy)


def test_an_index_without_a_class_is_named(tmp_path, no_weights):
    save_configs(tiny.tiny_stable_diffusion(), tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    del index["_class_name"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"Found no `_class_name` in the model_index.json of .*: save it again"):
        resolve_model(str(tmp_path))
