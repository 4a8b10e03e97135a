"""The math of Reflection-GRPO: advantages, clipped loss, KL, and the flow's SDE step.

Both training phases of RL-RIG (arXiv 2602.19974) use this file. In phase 1 a sample is a completion
of the Actor and an action is a token. In phase 2 a sample is an edited image and an action is one
denoising step.

    GRPO       arXiv 2402.03300   advantages within a group, k3 estimate of the KL
    PPO        arXiv 1707.06347   clipped loss
    DAPO       arXiv 2503.14476   two clip bounds; the sum over all actions divided by their number;
                                  groups with (nearly) equal rewards left out
    Flow-GRPO  arXiv 2505.05470   SDE step of a flow model, and its KL

Needs torch only: copy this file anywhere.
"""

import math

import torch
from torch.utils.checkpoint import checkpoint


def group_advantages(rewards, eps=0.05, flat_range=0.02):
    """Compare each sample with its group: A_i = (r_i - mean) / (std + eps) (GRPO).

    Args:
        rewards: (groups, G) floats; a row holds G >= 2 samples of the same state.
        eps: added to the std. Choose it above the noise of the reward, or a group that differs by
            noise alone counts as much as the others. (0.05 is for rewards of about 0 to 1.)
        flat_range: a group with max - min <= flat_range is flat: there is nothing to learn from it.

    Returns (advantages (groups, G) fp32, kept (groups, 1) bool). kept is False for a flat group:
    leave it out of mask and count of `clipped_loss`. If no group is kept, skip the optimizer step,
    because Adam moves the parameters even on a zero gradient. `clipped_loss` takes one row per
    sample: `advantages.reshape(-1, 1)` and `mask & kept.repeat_interleave(G, 0)`.
    Raises ValueError for a reward that is not finite and for groups of one sample.
    """
    if not rewards.isfinite().all():
        raise ValueError("a reward is NaN or infinite; check the output of the reward model")
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards {tuple(rewards.shape)}: make it (groups, G), G of 2 or more")
    rewards = rewards.float()
    mean = rewards.mean(1, keepdim=True)  # (groups, 1)
    std = rewards.std(1, correction=0, keepdim=True)
    kept = rewards.amax(1, keepdim=True) - rewards.amin(1, keepdim=True) > flat_range
    return torch.where(kept, (rewards - mean) / (std + eps), 0), kept


def clipped_loss(log_probs, old_log_probs, advantages, mask, count, clip_low=0.2, clip_high=0.28):
    """PPO's clipped policy loss with DAPO's two bounds.

        -sum min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) / count
        rho = exp(log_prob - old_log_prob)

    Args:
        log_probs: (B, T) with gradient, one entry per token or per denoising step.
        old_log_probs: (B, T), of the policy that sampled.
        advantages: (B, 1), one per sample, broadcast over its actions.
        mask: (B, T) bool, True for the actions that are trained. Other entries may hold anything.
        count: number of trained actions in the WHOLE optimizer step. Dividing every micro-batch by
            it makes their gradients add up to the gradient of one large batch.

    Returns (loss, stats). stats are for the log: ratio (mean rho), and the shares of actions whose
    gradient the clip stops, clipped_low (A < 0) and clipped_high (A > 0). These three are divided
    by count, so add them up over micro-batches. Of ratio_error, max |rho - 1|, take the maximum.
    Raises ValueError for shapes that would broadcast, FloatingPointError if rho is not finite.
    """
    shapes = [tuple(x.shape) for x in (log_probs, old_log_probs, mask, advantages)]
    shape = shapes[0]
    if shapes != [shape, shape, shape, (shape[0], 1)] or count <= 0:
        raise ValueError(f"{shapes=}, {count=}: need three (B, T), then (B, 1), and count > 0")
    log_ratio = log_probs.float() - old_log_probs.float()
    ratio = torch.where(mask, log_ratio, 0).exp()  # where first: padding may hold NaN
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    loss = -torch.where(mask, gain, 0).sum() / count
    stats = {
        "ratio": torch.where(mask, ratio, 0).sum().item() / count,
        "clipped_low": (mask & (advantages < 0) & (ratio < 1 - clip_low)).sum().item() / count,
        "clipped_high": (mask & (advantages > 0) & (ratio > 1 + clip_high)).sum().item() / count,
        "ratio_error": (ratio - 1).abs().max().item(),
    }
    if not math.isfinite(stats["ratio_error"]):
        raise FloatingPointError("rho is not finite: log_probs and old_log_probs are far apart")
    return loss, stats


def k3_kl(log_probs, ref_log_probs, bound=20.0):
    """k3 estimate of KL(pi || pi_ref) per token: exp(d) - d - 1 >= 0, d = log pi_ref - log pi.

    Both arguments have the same shape; returns that shape in fp32.
    The value is unbiased while tokens are sampled from pi (Schulman 2020). From the second update
    on pi has moved, so it is only approximate, as in GRPO. Its gradient is that of KL(pi_ref || pi)
    instead; near pi_ref the two nearly agree. `bound` keeps exp(d) finite.
    """
    delta = (ref_log_probs.float() - log_probs.float()).clamp(max=bound)
    return delta.expm1() - delta  # expm1, because exp(d) - 1 loses its digits near 0


def sde_step(velocity, sample, sigma, sigma_next, noise_level, next_sample=None, generator=None):
    """One denoising step of a flow model, sampled or replayed (Flow-GRPO, arXiv 2505.05470).

        x_sigma = (1 - sigma) image + sigma noise,  v = noise - image,  dt = sigma_next - sigma < 0
        s = noise_level sqrt(sigma / (1 - sigma)), at sigma = 1 with 1 - sigma_next below
        mean = x (1 + c dt) + v (1 + c (1 - sigma)) dt,  c = s^2 / (2 sigma)
        x' = mean + std z,  std = s sqrt(-dt),  z ~ N(0, I)

    Args:
        velocity, sample: v and x, (B, ...) of any dtype; all arithmetic is in fp32.
        sigma, sigma_next: floats, 1 >= sigma > sigma_next >= 0.
        noise_level: 0 gives Euler's ODE step.
        next_sample: None to sample x', or the recorded x' to replay it.
        generator: a torch.Generator, or a list of B of them: then the noise of a sample is the
            same in any batch.

    Returns (x', log_prob (B,), mean, std). log_prob is the MEAN over the D latent dimensions of
    log N(x'; mean, std^2), as in Flow-GRPO's code, so log rho is the true log ratio divided by D.
    Log rho shrinks like 1 / sqrt(D), so the clip range has to be that much narrower.
    An ODE step has log_prob None and std 0. The step to sigma_next = 0 is always an ODE step: noise
    added there would stay in the image. Raises ValueError for sigmas out of order, a negative
    noise_level, and tensors of different shapes.
    """
    if not 0 <= sigma_next < sigma <= 1 or noise_level < 0:
        numbers = f"{sigma=}, {sigma_next=}, {noise_level=}"
        raise ValueError(f"{numbers}: need 1 >= sigma > sigma_next >= 0 and noise_level >= 0")
    for tensor in (velocity, next_sample):
        if tensor is not None and tensor.shape != sample.shape:
            raise ValueError(f"{tuple(tensor.shape)} beside {tuple(sample.shape)}: align them")
    velocity, sample = velocity.float(), sample.float()
    dt = sigma_next - sigma
    # At sigma = 1, the first step, s would be infinite; this is what Flow-GRPO's code does.
    sigma_in_s = sigma if sigma < 1 else sigma_next
    s = noise_level * math.sqrt(sigma / (1 - sigma_in_s)) if sigma_next > 0 else 0.0
    c = s**2 / (2 * sigma)
    mean = sample * (1 + c * dt) + velocity * ((1 + c * (1 - sigma)) * dt)
    std = s * math.sqrt(-dt)
    if std == 0:
        return (mean if next_sample is None else next_sample), None, mean, std
    if next_sample is None:
        next_sample = mean + std * _draw_noise(mean, generator)
    # detach: the recorded x' is an action. The gradient of its log-prob goes through the mean.
    error = (next_sample.detach().float() - mean) / std  # (B, ...)
    log_density = -0.5 * error**2 - math.log(std * math.sqrt(2 * math.pi))
    return next_sample, log_density.flatten(1).mean(1), mean, std


def _draw_noise(like, generator):
    """Standard normal noise like `like`; a CPU generator gives the same on any device."""
    if isinstance(generator, list):
        return torch.stack([_draw_noise(x, g) for x, g in zip(like, generator, strict=True)])
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device).to(like.device)


def gaussian_kl(mean, mean_ref, std):
    """KL(N(mean, std^2) || N(mean_ref, std^2)) of one SDE step, averaged over latent dimensions.

        |mean - mean_ref|^2 / (2 std^2)

    Args: means (B, ...) and std > 0 as returned by `sde_step`. Returns (B,) fp32.
    Flow-GRPO's code leaves out the -dt of std^2, so for the same penalty our KL weight is theirs *
    |dt|. Raises ValueError at std 0.
    """
    if std <= 0:
        raise ValueError("std is 0: an ODE step has no density; leave it out")
    return ((mean.float() - mean_ref.float()) / std).square().flatten(1).mean(1) / 2


# ---- completions: for actor.py ----


def completion_mask(ids, eos_ids):
    """True up to and including the first end-of-sequence token, which is an action too.

    Args: ids (B, T); eos_ids: list of end-of-sequence ids. Returns (B, T) bool.
    `ids != pad` would lose the end token wherever pad and end share an id.
    """
    is_end = torch.isin(ids, ids.new_tensor(eos_ids)).long()
    ends_before = is_end.cumsum(1) - is_end  # (B, T)
    return ends_before == 0


def token_log_probs(logits, ids, temperature=1.0):
    """log softmax(logits / temperature) at the sampled ids.

    Args: logits (B, T, V), where logits[:, t] predict ids[:, t]; ids (B, T). Returns (B, T) fp32.
    Raises ValueError if logits and ids have different lengths.
    """
    if logits.shape[:2] != ids.shape:
        raise ValueError(f"logits {tuple(logits.shape)} for ids {tuple(ids.shape)}: align them")
    log_probs = (logits.float() / temperature).log_softmax(-1)  # (B, T, V)
    return log_probs.gather(-1, ids[..., None])[..., 0]  # (B, T)


def chunked_token_log_probs(logits, ids, temperature=1.0):
    """`token_log_probs` with less memory.

    log_softmax keeps fp32 copies of all logits for the backward pass, each of 5 GB for 32
    completions of 256 tokens at V = 151,936. Here they exist for one completion at a time and are
    recomputed in the backward pass.
    """
    rows = []  # (1, T) each
    for row_logits, row_ids in zip(logits.split(1), ids.split(1), strict=True):
        row = (row_logits, row_ids, temperature)
        rows.append(checkpoint(token_log_probs, *row, use_reentrant=False))
    return torch.cat(rows)  # (B, T)
