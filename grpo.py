"""Reflection-GRPO, the mathematics: advantages, log-probs, clipped loss, KL, the flow's SDE step.

Both phases of RL-RIG train with this file. Phase 1: a sample is the Actor's completion and an
action is a token. Phase 2: a sample is the Editor's picture and an action is a denoising step.

    advantage  A_i = (r_i - mean_g) / (std_g + eps)             GRPO, arXiv 2402.03300
    loss       -sum min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) / count
               rho = exp(log_prob - old_log_prob)               PPO, 1707.06347; DAPO, 2503.14476
    k3         exp(D) - D - 1, D = log pi_ref - log pi          Schulman 2020; GRPO
    flow       x_sigma = (1 - sigma) x0 + sigma e, v = e - x0, dt = sigma_next - sigma < 0
    SDE step   s = a sqrt(sigma / (1 - sigma))                  Flow-GRPO, arXiv 2505.05470
               mean = x (1 + s^2 dt / (2 sigma)) + v (1 + s^2 (1 - sigma) / (2 sigma)) dt
               x' = mean + std z, std = s sqrt(-dt), z ~ N(0, I)
    its KL     |mean - mean_ref|^2 / (2 std^2)

Symbols: r rewards, A advantages, rho ratio, v velocity, x sample, x' next_sample, a noise_level.
Differs from GRPO, with DAPO: two clips, one division by the actions of the whole step, no flat
groups. Differs from Flow-GRPO, with its code: log-prob and KL are means over latent dims.

torch only: this file works alone, anywhere. Demo: python grpo.py
"""

import math

import torch


def group_advantages(rewards, groups, eps=1e-4, flat_range=0.02):
    """Rewards (N,) and integer group ids (N,) to (advantages (N,) fp32, kept (N,) bool).

    A_i = (r_i - mean_g) / (std_g + eps), population std, over a group g of samples of one
    identical state (GRPO, arXiv 2402.03300). A flat group, max - min <= flat_range, has A = 0 and
    kept = False: leave it out of the mask and the count of `clipped_loss`, and skip a step that
    keeps none (Adam moves on zero gradients). Raises ValueError on a reward that is not finite
    and on a group of one.
    """
    if not rewards.isfinite().all():
        raise ValueError("a reward is NaN or infinite; look at the reward model's output")
    rewards = rewards.float()
    advantages = torch.zeros_like(rewards)
    kept = torch.zeros_like(rewards, dtype=torch.bool)
    for group in groups.unique():
        members = groups == group
        group_rewards = rewards[members]  # (G,)
        if len(group_rewards) == 1:
            raise ValueError(f"group {group.item()} has one sample; it needs others to compare to")
        if group_rewards.max() - group_rewards.min() <= flat_range:
            continue
        std = group_rewards.std(correction=0)
        advantages[members] = (group_rewards - group_rewards.mean()) / (std + eps)
        kept[members] = True
    return advantages, kept


def completion_mask(ids, eos_ids):
    """Sampled ids (B, T) and a list of end-of-sequence ids to (B, T) bool: the tokens to train on.

    True up to and including the first end, throughout if there is none. The end is an action too,
    which `ids != pad` would lose where the pad id is an end id.
    """
    is_end = torch.isin(ids, ids.new_tensor(eos_ids)).long()
    ends_before = is_end.cumsum(1) - is_end  # (B, T)
    return ends_before == 0


def token_log_probs(logits, ids, temperature=1.0):
    """Logits (B, T, V) of any dtype and ids (B, T) in [0, V) to log pi(ids): (B, T) fp32.

    log softmax(logits / temperature) at ids, temperature > 0; logits[:, t] predict ids[:, t].
    Beside the gradient w.r.t. logits, memory is a few fp32 rows; log_softmax and gather would
    hold two fp32 (B, T, V), 5 GB for 4096 tokens at V = 151,936. Raises ValueError on shapes.
    """
    if logits.shape[:2] != ids.shape:
        raise ValueError(f"logits {tuple(logits.shape)} for ids {tuple(ids.shape)}: align them")
    return _TokenLogProbs.apply(logits, ids, temperature)


class _TokenLogProbs(torch.autograd.Function):
    """Chunk by chunk, with the gradient by hand: autograd would keep every chunk's softmax."""

    @staticmethod
    def forward(ctx, logits, ids, temperature):
        chosen = torch.empty(ids.shape, device=logits.device)  # (B, T) fp32
        normaliser = torch.empty_like(chosen)
        for chunk in _chunks(ids):
            scaled = logits[chunk].float() / temperature  # (8, V)
            chosen[chunk] = scaled.gather(1, ids[chunk][:, None])[:, 0]
            normaliser[chunk] = scaled.logsumexp(1)
        ctx.save_for_backward(logits, ids, normaliser)
        ctx.temperature = temperature
        return chosen - normaliser

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        logits, ids, normaliser = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        grad_scaled = grad_output / ctx.temperature  # (B, T)
        for chunk in _chunks(ids):
            scaled = logits[chunk].float() / ctx.temperature  # (8, V)
            weight = grad_scaled[chunk][:, None]  # (8, 1)
            grad = scaled.sub_(normaliser[chunk][:, None]).exp_().mul_(-weight)  # -softmax weight
            grad_logits[chunk] = grad.scatter_add_(1, ids[chunk][:, None], weight)
        return grad_logits, None, None


def _chunks(ids, size=8):
    """Indices of views (size, V) of the logits; flattening a slice of them would copy it."""
    for row in range(ids.shape[0]):
        for start in range(0, ids.shape[1], size):
            yield row, slice(start, start + size)


def clipped_loss(log_probs, old_log_probs, advantages, mask, count, clip_low=0.2, clip_high=0.28):
    """PPO's clipped loss (1707.06347) with DAPO's two clips (2503.14476): (scalar, stats).

    log_probs (with gradient), old_log_probs: one shape, (B, T) tokens, (B,) or (B, S) denoising
    steps. advantages and mask, True where trained, broadcast to it: (B, 1). count: the trained
    entries of the WHOLE optimiser step, so that micro-batches add up to one and the same gradient.
    stats: floats that add up likewise, the mean ratio and the shares of entries whose gradient
    the clip stops (low: A < 0, high: A > 0); but of ratio_error, max |rho - 1|, take the max.
    Raises ValueError on shapes and count, FloatingPointError if rho is not finite.
    """
    shapes = [tuple(x.shape) for x in (log_probs, old_log_probs, advantages, mask)]
    if shapes[0] != shapes[1] or len(set(map(len, shapes))) > 1 or count <= 0:
        raise ValueError(f"{shapes=}, {count=}: need (B, T) (B, T) (B, 1) (B, T) and count > 0")
    log_ratio = log_probs.float() - old_log_probs.float()
    ratio = torch.where(mask, log_ratio, 0).exp()  # padding may hold anything, even NaN
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
    """exp(D) - D - 1 >= 0, D = log pi_ref - log pi, at tokens drawn from pi: same shape, fp32.

    Unbiased for KL(pi || pi_ref) in value (k3 of Schulman 2020; arXiv 2402.03300), but a biased
    gradient of it as a loss term: on policy it is that of KL(pi_ref || pi), equal to first order.
    D above `bound` is clamped, so exp stays finite, and has no gradient: pi hardly draws such a
    token. D far below 0, where pi has moved to a token, needs no bound; its gradient tends to 1.
    """
    delta = (ref_log_probs.float() - log_probs.float()).clamp(max=bound)
    return delta.expm1() - delta  # expm1: exp(D) - 1 loses its digits near 0


def sde_step(velocity, sample, sigma, sigma_next, noise_level, next_sample=None, generator=None):
    """One denoising step of a flow, sampled or replayed: (next_sample, log_prob, mean, std).

    velocity, sample: (B, ...) of any dtype, fp32 inside. Floats 1 >= sigma > sigma_next >= 0.
    next_sample None: drawn, by a torch.Generator or a list of B (then the noise of a sample does
    not depend on the batch); given: replayed, returned as it is. log_prob (B,): MEAN over latent
    dims of log N(next_sample; mean, std^2), so rho is the D-th root of the true ratio and the
    clip has to shrink as 1 / sqrt(D). Its gradient goes through mean alone. At noise_level 0, or
    sigma_next 0 (noise would stay in the picture), it is Euler's ODE step: log_prob None, std 0.
    At sigma 1, s has sigma_next in 1 - sigma. Flow-GRPO, arXiv 2505.05470.
    Raises ValueError on sigmas out of order and on a list of generators that is not B long.
    """
    if not 0 <= sigma_next < sigma <= 1:
        raise ValueError(f"sigma {sigma} to {sigma_next}: need 1 >= sigma > sigma_next >= 0")
    velocity, sample = velocity.float(), sample.float()
    dt = sigma_next - sigma
    below_one = sigma if sigma < 1 else sigma_next
    s = noise_level * math.sqrt(sigma / (1 - below_one)) if sigma_next > 0 else 0.0
    pull = s**2 / (2 * sigma)
    mean = sample * (1 + pull * dt) + velocity * ((1 + pull * (1 - sigma)) * dt)
    std = s * math.sqrt(-dt)
    if std == 0:
        return mean if next_sample is None else next_sample, None, mean, std
    if next_sample is None:
        next_sample = mean + std * _draw_noise(mean, generator)
    error = (next_sample.detach().float() - mean) / std  # (B, ...)
    log_density = -0.5 * error**2 - math.log(std * math.sqrt(2 * math.pi))
    return next_sample, log_density.flatten(1).mean(1), mean, std


def _draw_noise(like, generator):
    """Standard normal noise; a CPU generator draws the same on every device."""
    if isinstance(generator, list):
        return torch.stack([_draw_noise(x, g) for x, g in zip(like, generator, strict=True)])
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device).to(like.device)


def gaussian_kl(mean, mean_ref, std):
    """KL(N(mean, std^2) || N(mean_ref, std^2)) of one SDE step, averaged over latent dims: (B,).

    Means (B, ...) and std as `sde_step` returns them; fp32; ValueError at std 0. arXiv 2505.05470.
    """
    if std <= 0:
        raise ValueError("std is 0: a step of the ODE has no density; leave it out")
    return ((mean.float() - mean_ref.float()) / std).square().flatten(1).mean(1) / 2


def _learn(parameter, policy):
    """The demo (tensors: last lines): mean rewards. policy() samples, policy(actions) replays."""
    optimizer = torch.optim.Adam([parameter], lr=0.03)
    for _ in range(48):
        actions, old_log_probs, rewards = policy()  # ..., (128, S), (128,)
        yield rewards.mean().item()
        advantages, kept = group_advantages(rewards, torch.arange(128) // 16)
        mask = kept[:, None].expand_as(old_log_probs)
        recorded = (old_log_probs.detach(), advantages[:, None], mask, mask.sum().item())
        for _ in range(2):
            loss, _ = clipped_loss(policy(actions)[1], *recorded)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _bandit(arms=None):
    if arms is None:
        arms = logits.softmax(0).multinomial(128, replacement=True)[:, None]  # (128, 1)
    log_probs = token_log_probs(logits.expand(128, 1, 4), arms)
    return arms, log_probs, torch.normal(payouts[arms[:, 0]], 0.1)


def _flow(path=None, noise_level=0.8):
    """A group shares its start. x0 ~ N(0, 0.25 I): the velocity is known, the drift is learnt."""
    latents = path[:1] if path else [torch.randn(8, 2).repeat_interleave(16, 0)]
    log_probs = []
    for step in range(8):
        sigma = 1 - step / 8
        x = latents[step]  # (128, 2)
        known = x * (sigma - (1 - sigma) * 0.25) / ((1 - sigma) ** 2 * 0.25 + sigma**2)
        given = path[step + 1] if path else None
        x, log_prob, *_ = sde_step(known + drift, x, sigma, sigma - 1 / 8, noise_level, given)
        latents.append(x.detach())
        log_probs += [] if log_prob is None else [log_prob]
    rewards = (-(latents[-1] - target).square().sum(1)).exp()  # 1 at the target
    return latents, torch.stack(log_probs, 1) if log_probs else None, rewards


if __name__ == "__main__":
    torch.manual_seed(0)
    logits, payouts = torch.zeros(4, requires_grad=True), torch.tensor([0.1, 0.3, 0.5, 0.9])
    drift, target = torch.zeros(2, requires_grad=True), torch.ones(2)
    pairs = [(r, _flow(noise_level=0)[2].mean().item()) for r in _learn(drift, _flow)]
    curves = [list(_learn(logits, _bandit)), *zip(*pairs)]
    for name, curve in zip(("bandit", "flow, SDE", "flow, ODE"), curves):
        bars = "".join("▁▂▃▄▅▆▇█"[int(reward * 7.99)] for reward in curve)
        print(f"{name:9} {bars} mean reward {curve[0]:.2f} -> {curve[-1]:.2f}")
