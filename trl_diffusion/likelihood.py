"""Noise processes: what a denoiser is shown, what it should answer, and how far off it was.

Epsilon, v, sample and flow prediction differ here and nowhere else. Everything is a pure function of tensors; the
schedule is copied out of the pipeline's scheduler once, so that sampling during training cannot disturb it.
"""

import math
from dataclasses import dataclass

import torch


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
WEIGHTINGS = ("native", "epsilon", "min_snr", "elbo")
TIMESTEP_SAMPLINGS = ("uniform", "logit_normal", "mode")
ELBO_BOUND = 10.0
"""Largest weight of the noise's error with `weighting="elbo"`, whose true weight has no bound where noise is faint."""


_THE_MODELS_OWN = (
    "load the pipeline with the scheduler that it was published with, and if this is the one, the model cannot be "
    "trained here (the scheduler says with which noise it was trained, so another would not help)."
)


@dataclass(frozen=True)
class TimestepSampling:
    """
    From a uniform number to a place in the noise range: 0 is the clean image, 1 is pure noise.

    A monotone function of its one argument, so that an example's timestep stays a function of the example's own draw.

    Args:
        distribution (`str`, *optional*, defaults to `"uniform"`):
            `"uniform"`; `"logit_normal"`, the logistic function of a normal number; or `"mode"`, which favours the
            middle (or, with a negative `mode_scale`, both ends).
        logit_mean (`float`, *optional*, defaults to `0.0`):
            Mean of that normal number. Above 0 leans towards noise, as in the paper; the scripts of diffusers, which
            count the steps of sampling, lean the other way.
        logit_std (`float`, *optional*, defaults to `1.0`): Standard deviation of that normal number.
        mode_scale (`float`, *optional*, defaults to `1.29`): Strength of `"mode"`, from -1 to 2 / (pi - 2).
        shift (`float`, *optional*, defaults to `1.0`):
            The scheduler's shift towards noise, `shift s / (1 + (shift - 1) s)`, applied to what was drawn.
        min_timestep (`float`, *optional*, defaults to `0.0`), max_timestep (`float`, *optional*, defaults to `1.0`):
            Part of the noise range that all of this is squeezed into, last.

    Source: [Stable Diffusion 3](https://huggingface.co/papers/2403.03206), section 3.1.
    """

    distribution: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    shift: float = 1.0
    min_timestep: float = 0.0
    max_timestep: float = 1.0

    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        """Fractions of the noise range of the shape of `u`, for numbers in [0, 1). The default returns `u`."""
        if self.distribution == "logit_normal":
            s = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u))
        elif self.distribution == "mode":
            # The paper's 1 - v - scale (cos^2(pi v / 2) - 1 + v) at v = 1 - u, so that it rises with u.
            s = u - self.mode_scale * (torch.sin(math.pi / 2 * u) ** 2 - u)
        else:
            s = u
        s = self.shift * s / (1 + (self.shift - 1) * s)
        return self.min_timestep + (self.max_timestep - self.min_timestep) * s


def _weight(
    weighting: str, snr_gamma: float, noise_error: torch.Tensor, snr: torch.Tensor, elbo: torch.Tensor
) -> torch.Tensor:
    """
    The factor on the denoiser's own error, see [`DDPMProcess.weight`]. `noise_error` turns that error into the
    noise's, `elbo` is the bound's weight of the noise's error.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"Unknown weighting {weighting!r}: choose one of {WEIGHTINGS}.")
    if weighting == "native":
        return torch.ones_like(snr)
    if weighting == "epsilon":
        return noise_error
    if weighting == "min_snr":
        # Where the signal is 0, gamma / SNR is infinite and the bound is 1, as it should be.
        return noise_error * (snr_gamma / snr).clamp(max=1)
    return noise_error * elbo.clamp(max=ELBO_BOUND)


@dataclass(frozen=True)
class DDPMProcess:
    """
    The variance-preserving process of DDPM: `x_t = a_t x_0 + s_t eps` with `a_t^2 + s_t^2 = 1`.

    Args:
        alphas_cumprod (`torch.Tensor` of shape `(num_train_timesteps,)`):
            `a_t^2`, float32.
        prediction_type (`str`):
            What the denoiser answers: `"epsilon"` is the noise, `"v_prediction"` is `a eps - s x_0`, `"sample"` is
            `x_0`.

    Source: [DDPM](https://huggingface.co/papers/2006.11239); v from
    [Progressive Distillation](https://huggingface.co/papers/2202.00512).
    """

    alphas_cumprod: torch.Tensor
    prediction_type: str

    @classmethod
    def from_scheduler(cls, scheduler) -> "DDPMProcess":
        """
        Reads the process from a diffusers scheduler of the DDPM kind (DDPM, DDIM, PNDM, Euler, DPM-Solver ...).

        Raises:
            `ValueError`: if the scheduler carries no `alphas_cumprod`, gives the denoiser noise levels rather than
                numbers of timesteps, samples along another path, or its prediction type is unknown.
        """
        alphas_cumprod, config = getattr(scheduler, "alphas_cumprod", None), scheduler.config
        prediction_type = config.get("prediction_type")
        problems = {
            "without `alphas_cumprod`": alphas_cumprod is None,
            "with timestep_type='continuous'": config.get("timestep_type") == "continuous",
            "with use_flow_sigmas=True": bool(config.get("use_flow_sigmas")),
            f"with prediction_type={prediction_type!r}": prediction_type not in PREDICTION_TYPES,
        }
        for problem, found in problems.items():
            if found:
                raise ValueError(
                    f"Found {type(scheduler).__name__} {problem}; expected a DDPM-like scheduler with one of "
                    f"{PREDICTION_TYPES}: {_THE_MODELS_OWN}"
                )
        return cls(torch.as_tensor(alphas_cumprod, dtype=torch.float32).clone(), prediction_type)

    def timesteps(self, u: torch.Tensor) -> torch.Tensor:
        """Integer timesteps, 0 to `num_train_timesteps - 1`, at these fractions of the schedule, numbers in [0, 1]."""
        return (u * len(self.alphas_cumprod)).long().clamp(max=len(self.alphas_cumprod) - 1)

    def coefficients(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(a_t, s_t)`, shaped to multiply tensors of the shape of `like` and in float32."""
        alpha_bar = self.alphas_cumprod.to(t.device)[t].reshape(-1, *[1] * (like.ndim - 1))
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def corrupt(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """`x_t` of the shape of `x0`, for integer timesteps `t` of shape `(batch,)`."""
        a, s = self.coefficients(t, x0)
        return a * x0 + s * noise

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What a perfect denoiser would answer, of the shape of `x0`."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        a, s = self.coefficients(t, x0)
        return a * noise - s * x0

    def weight(self, t: torch.Tensor, weighting: str = "native", snr_gamma: float = 5.0) -> torch.Tensor:
        """
        The factor on the denoiser's own error at timestep `t`.

        Args:
            t (`torch.Tensor` of shape `(batch,)`): Integer timesteps.
            weighting (`str`, *optional*, defaults to `"native"`):
                `"native"` is 1: the error in what the denoiser answers. `"epsilon"` turns it into the error of the
                noise, whatever the denoiser answers. `"min_snr"` is that times `min(1, snr_gamma / SNR)`. `"elbo"` is
                it times the weight of the variational bound, `T / 2 (SNR_{t-1} / SNR_t - 1)` for `T` timesteps, but
                at most [`ELBO_BOUND`]; with timesteps drawn uniformly the mean is then the bound, but for that.
            snr_gamma (`float`, *optional*, defaults to `5.0`): Bound on the signal-to-noise ratio of `"min_snr"`.

        Returns:
            `torch.Tensor` of shape `(batch,)`, float32.

        Raises:
            `ValueError`: if `weighting` is unknown.

        Source: [Min-SNR](https://huggingface.co/papers/2303.09556); the bound from
        [Variational Diffusion Models](https://huggingface.co/papers/2107.00630).
        """
        alphas_cumprod = self.alphas_cumprod.to(t.device)
        alpha_bar = alphas_cumprod[t]
        snr = alpha_bar / (1 - alpha_bar)
        # E_epsilon / E_native: https://huggingface.co/papers/2202.00512
        noise_error = {"epsilon": torch.ones_like(snr), "v_prediction": alpha_bar, "sample": snr}[self.prediction_type]
        before = alphas_cumprod[(t - 1).clamp(min=0)]
        snr_before = torch.where(t > 0, before / (1 - before), torch.inf)
        elbo = len(alphas_cumprod) / 2 * (snr_before / snr - 1)
        return _weight(weighting, snr_gamma, noise_error, snr, elbo)


@dataclass(frozen=True)
class FlowProcess:
    """
    The straight path of rectified flow: `x_t = (1 - t) x_0 + t eps`, along which the denoiser answers `eps - x_0`.

    `t` is the noise level (diffusers: sigma), a float32 number in (0, 1). What the denoiser is given for it is its
    family's business.

    Source: [Stable Diffusion 3](https://huggingface.co/papers/2403.03206).
    """

    @classmethod
    def from_scheduler(cls, scheduler) -> "FlowProcess":
        """
        Checks that a diffusers scheduler is one of flow matching (flow-matching Euler or Heun, or a solver such as
        DPM-Solver with flow prediction and flow sigmas), whose shift [`Family.timestep_shift`] reads.

        Raises:
            `ValueError`: if it is not.
        """
        config, classes = scheduler.config, {base.__name__ for base in type(scheduler).__mro__}
        found = f"Found {type(scheduler).__name__} with"
        if config.get("invert_sigmas"):
            raise ValueError(f"{found} invert_sigmas=True; expected a flow-matching scheduler: {_THE_MODELS_OWN}")
        if classes & {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"}:
            return cls()
        prediction_type = config.get("prediction_type")
        if prediction_type != "flow_prediction" or "flow_shift" not in config:
            raise ValueError(
                f"{found} prediction_type={prediction_type!r}; expected a flow-matching scheduler: {_THE_MODELS_OWN}"
            )
        if not config.get("use_flow_sigmas"):
            raise ValueError(
                f"{found} prediction_type='flow_prediction' and use_flow_sigmas=False, which samples along another "
                "path than that of flow matching: set `use_flow_sigmas=True`."
            )
        return cls()

    def timesteps(self, u: torch.Tensor) -> torch.Tensor:
        """Noise levels at these fractions of the noise range, numbers in [0, 1]; the two ends are kept out."""
        return u.clamp(1e-5, 1 - 1e-5).float()

    def coefficients(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(1 - t, t)`, shaped to multiply tensors of the shape of `like`."""
        t = t.reshape(-1, *[1] * (like.ndim - 1))
        return 1 - t, t

    def corrupt(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """`x_t` of the shape of `x0`, for noise levels `t` of shape `(batch,)`."""
        a, s = self.coefficients(t, x0)
        return a * x0 + s * noise

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What a perfect denoiser would answer, of the shape of `x0`."""
        return noise - x0

    def weight(self, t: torch.Tensor, weighting: str = "native", snr_gamma: float = 5.0) -> torch.Tensor:
        """
        The factor on the denoiser's own error at noise level `t`; as [`DDPMProcess.weight`], with
        `SNR = ((1 - t) / t)^2`, the noise's error `(1 - t)^2` times the velocity's, and the bound's weight of the
        noise's error `1 / (t (1 - t))`, which is `-d log SNR / dt / 2`.
        """
        return _weight(weighting, snr_gamma, (1 - t).square(), ((1 - t) / t).square(), 1 / (t * (1 - t)))


NoiseProcess = DDPMProcess | FlowProcess


def denoising_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    Mean squared error of each image, in float32.

    Published code takes the mean over the latent dimensions where the papers write a squared norm; `beta` is given in
    these units, so that it means the same at every resolution.

    Args:
        prediction (`torch.Tensor` of shape `(batch, ...)`): The denoiser's answer, in any float dtype.
        target (`torch.Tensor` of shape `(batch, ...)`): See [`DDPMProcess.target`].

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32.
    """
    # The log-ratio is a difference of two nearly equal errors (1e-4 to 1e-2), too fine for half precision.
    return (prediction.float() - target.float()).square().flatten(1).mean(1)
