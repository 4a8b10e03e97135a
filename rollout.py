"""Recording of a flow-matching pipeline's steps, so that they can be replayed with gradient.

No pipeline is copied: while one runs, hooks keep what its transformer is called with and what it
answers, and the scheduler's `step` becomes `grpo.sde_step` (Flow-GRPO, arXiv 2505.05470) on a
window of steps (MixGRPO, arXiv 2507.21802). A pipeline that guides calls its transformer more
than once a step, or on a batch several times as large, and mixes the answers o_k itself:

    v = sum_k w_k o_k                      classifier-free guidance: w = (s, 1 - s)
    v = c |o_0| / |c|, c = sum_k w_k o_k   the same with the length, per token, of the guided answer

Which of the two, and w, is found from the answers and the v that the scheduler is given, and
checked at every step; a pipeline that mixes otherwise is refused.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch

from grpo import sde_step


@dataclass
class RecordedStep:
    """One SDE step of a rollout of B pictures; all tensors fp32 but those in `calls`."""

    calls: list[tuple]  # (positional, keyword) arguments of the transformer
    weights: list[float]  # w, one for each B rows that the transformer answered
    rescaled: bool  # whether the mixture has the length of the first answer
    sample: object  # (B, tokens, channels) latents before the step
    next_sample: object  # the same after it
    sigma: float
    sigma_next: float
    noise_level: float
    log_prob: object  # (B,) as sampled


@dataclass
class Rollout:
    """Edited pictures, and the steps of the window that can be replayed."""

    images: list
    steps: list[RecordedStep]


def answers(predictions, like):
    """Transformer outputs to the answers about B latents `like`, each of their shape.

    Rows beyond B are further answers; tokens beyond the latents' are those of the picture edited.
    """
    parts = [part for prediction in predictions for part in prediction.split(len(like))]
    return [part[:, : like.shape[1]].float() for part in parts]


def mix(outputs, weights, rescaled):
    """Answers of one shape to the velocity."""
    velocity = sum(weight * output for weight, output in zip(weights, outputs))
    if rescaled:
        length = velocity.norm(dim=-1, keepdim=True)
        velocity = velocity * (outputs[0].norm(dim=-1, keepdim=True) / length)
    return velocity


def find_mixture(outputs, velocity, tolerance):
    """(weights, rescaled) with which `mix` gives the velocity, or None.

    tolerance: of the root mean square, relative.
    """
    columns = torch.stack([output.double().flatten() for output in outputs])  # (K, N)
    inverse = torch.linalg.pinv(columns @ columns.T, hermitian=True)
    weights = inverse @ (columns @ velocity.double().flatten())  # least squares
    candidates = [(weights, False)]
    if len(outputs) == 2:
        guided, other = (output.double() for output in outputs)
        unit = velocity.double() / velocity.double().norm(dim=-1, keepdim=True)

        def across(x):
            """What of x the velocity's length cannot explain."""
            return x - (x * unit).sum(-1, keepdim=True) * unit

        change = across(guided - other)
        scale = -(across(other) * change).sum() / change.square().sum()
        candidates.append((torch.stack([scale, 1 - scale]), True))
    best = None
    for weights, rescaled in candidates:
        weights = weights.cpu().round(decimals=4).tolist()  # of YAML, not of the rounding of bf16
        error = (mix(outputs, weights, rescaled) - velocity).norm() / velocity.norm()
        if error <= tolerance:
            best, tolerance = (weights, rescaled), error
    return best


@contextmanager
def recorded(pipeline, generators, window, noise_level):
    """While inside, the pipeline samples by the SDE on `window`; yields the list of its steps.

    Args: generators: one for each picture, of the SDE's noise; window: a range of steps.
    """
    scheduler, transformer = pipeline.scheduler, pipeline.transformer
    calls, predictions, steps = [], [], []
    latents = None  # fp32, whatever the pipeline's dtype
    done = 0

    def keep(_, positional, keywords, output):
        calls.append((positional, keywords))
        predictions.append(output[0])

    def step(velocity, timestep, sample, **_):
        nonlocal latents, done
        latents = sample.float() if latents is None else latents
        sigma, sigma_next = scheduler.sigmas[done : done + 2].tolist()
        level = noise_level if done in window else 0.0
        velocity = velocity.float()
        if level > 0:
            outputs = answers(predictions, velocity)
            tolerance = max(1e-4, 2 * torch.finfo(predictions[0].dtype).eps)
            mixture = find_mixture(outputs, velocity, tolerance)
            if mixture is None:
                raise ValueError(
                    f"{type(pipeline).__name__} mixes the {len(outputs)} answers of its "
                    "transformer in a way that cannot be replayed: turn its guidance off"
                )
            velocity = mix(outputs, *mixture)
        next_latents, log_prob, _, _ = sde_step(
            velocity, latents, sigma, sigma_next, level, generator=generators
        )
        if log_prob is not None:
            sigmas = (sigma, sigma_next, level)
            steps.append(
                RecordedStep(list(calls), *mixture, latents, next_latents, *sigmas, log_prob)
            )
        calls.clear()
        predictions.clear()
        latents = next_latents
        done += 1
        return (next_latents.to(sample.dtype),)

    hook = transformer.register_forward_hook(keep, with_kwargs=True)
    scheduler.step = step
    try:
        yield steps
    finally:
        hook.remove()
        del scheduler.step


def replayed(transformer, recorded_step):
    """One recorded step again, with gradient: (log_prob (B,), mean, std)."""
    predictions = [
        transformer(*positional, **keywords)[0] for positional, keywords in recorded_step.calls
    ]
    outputs = answers(predictions, recorded_step.sample)
    velocity = mix(outputs, recorded_step.weights, recorded_step.rescaled)
    _, log_prob, mean, std = sde_step(
        velocity,
        recorded_step.sample,
        recorded_step.sigma,
        recorded_step.sigma_next,
        recorded_step.noise_level,
        next_sample=recorded_step.next_sample,
    )
    return log_prob, mean, std
