"""Trains the embedded models from scratch on the CPU or a GPU: `python tiny/pretrain.py`.

Three stages, each seeded and resumable (a step's data depend on the seed and the step alone, so a
run that was killed goes on from its last checkpoint as if nothing had happened):

    vae   autoencoder of 32 x 32 pictures                        -> models/flow/vae
    flow  rectified-flow transformer with its text encoders, text-to-image and editing at once
                                                                 -> models/flow
    vlm   LLaVA-type model: Checker and Actor                    -> models/vlm
"""

import argparse
import random
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import lessons
import models
import questions
import world
from fit import SEED, WORK, fit

GARBLED = 0.3  # share of relation words that captions get wrong
FLOW_RATE = 1e-3
VLM_RATE = 2e-3


def to_tensor(images):
    """(N, 32, 32, 3) uint8 -> (N, 3, 32, 32) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(steps=2500):
    """Mean absolute plus squared error, a little noise on the latents and a little KL."""
    pipeline = models.build_pipeline(SEED)
    vae = pipeline.vae.train()

    def loss_of(rng, step):
        images = to_tensor(np.stack([world.render(lessons.messy_scene(rng)) for _ in range(64)]))
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        error = (decoded - images).abs().mean() + (decoded - images).square().mean()
        kl = posterior.kl().mean() / (32 * 32)
        return error + 3e-3 * kl, {"error": f"{error.item():.4f}", "kl": f"{kl.item():.2f}"}

    def save():
        # Kontext's latents are (z - shift) * scale: standardise them over clean pictures.
        rng = random.Random(SEED)
        scenes = [world.random_scene(rng, rng.choice((2, 3, 4))) for _ in range(512)]
        with torch.no_grad():
            posterior = vae.encode(to_tensor(np.stack([world.render(s) for s in scenes])))
        latents = posterior.latent_dist.mode()
        shift, scale = latents.mean().item(), 1 / latents.std().item()
        vae.register_to_config(shift_factor=shift, scaling_factor=scale)
        vae.save_pretrained(WORK / "vae" / "model")

    fit("vae", vae, loss_of, steps, 2e-3, save)


def train_flow(steps=4500):
    """Flow matching, v = noise - latents, on 48 captions and 80 edits a step."""
    from diffusers import AutoencoderKL

    pipeline = models.build_pipeline(SEED)
    pipeline.vae = AutoencoderKL.from_pretrained(WORK / "vae" / "model")
    vae, transformer = pipeline.vae.eval().requires_grad_(False), pipeline.transformer
    trained = torch.nn.ModuleDict(
        {
            "transformer": transformer,
            "text_encoder": pipeline.text_encoder,
            "text_encoder_2": pipeline.text_encoder_2,
        }
    )
    side = world.GRID
    ids = pipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
    context_ids = ids.clone()
    context_ids[:, 0] = 1  # as the Kontext pipeline marks the tokens of the picture to edit

    def encode(scenes):
        images = to_tensor(np.stack([world.render(things) for things in scenes]))
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mode()
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        return pipeline._pack_latents(latents, len(scenes), 4, side * 2, side * 2)  # (B, 16, 16)

    def flow_loss(latents, texts, length, context=None):
        embeds, pooled, text_ids = pipeline.encode_prompt(texts, None, max_sequence_length=length)
        # Sampled as the scheduler's shift of 3 spaces its steps: mostly where layouts are decided.
        uniform = torch.rand(len(latents), 1, 1)
        sigma = 3 * uniform / (1 + 2 * uniform)
        noise = torch.randn_like(latents)
        noisy = (1 - sigma) * latents + sigma * noise
        prediction = transformer(
            hidden_states=noisy if context is None else torch.cat([noisy, context], 1),
            timestep=sigma.flatten(),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            txt_ids=text_ids,
            img_ids=ids if context is None else torch.cat([ids, context_ids]),
            return_dict=False,
        )[0]
        return (prediction[:, : noisy.shape[1]] - (noise - latents)).square().mean()

    def loss_of(rng, step):
        edits = [lessons.edit(rng) for _ in range(80)]
        before = encode([things for things, _, _ in edits])
        after = encode([things for _, _, things in edits])
        captions = [lessons.caption(rng, things, GARBLED) for things, _, _ in edits[:48]]
        picture = flow_loss(before[:48], captions, 20)
        change = flow_loss(after, [text for _, text, _ in edits], 10, before)
        shown = {"picture": f"{picture.item():.3f}", "edit": f"{change.item():.3f}"}
        return 0.4 * picture + 0.6 * change, shown

    def save():
        pipeline.save_pretrained(WORK / "flow" / "model")

    fit("flow", trained, loss_of, steps, FLOW_RATE, save)


def pack(tokenizer, conversations):
    """Packs all questions about a picture behind its image tokens, blind to each other.

    Args: conversations: per picture a list of (user message, answer, weight).
    Returns: input_ids (B, T), attention mask (B, 1, T, T) fp32 additive, position_ids (B, T),
    next-token weights (B, T): zero but where the next token belongs to an answer.
    """
    image = [tokenizer.convert_tokens_to_ids("<image>")] * world.GRID**2
    start = len(image)
    rows = []
    for conversation in conversations:
        ids, segment, position, weight = list(image), [0] * start, list(range(start)), [0.0] * start
        asked = tokenizer([text + " <answer>" for text, _, _ in conversation]).input_ids
        answered = tokenizer([answer + " </s>" for _, answer, _ in conversation]).input_ids
        for number, (question, answer) in enumerate(zip(asked, answered), 1):
            # A verdict has one token that counts: its </s> is trivial.
            share = conversation[number - 1][2]
            length = len(question) + len(answer)
            ids += question + answer
            segment += [number] * length
            position += range(start, start + length)
            weight += [0.0] * (len(question) - 1) + [share] * len(answer) + [0.0]
        rows.append((ids, segment, position, weight))
    longest = max(len(row[0]) for row in rows)
    padded = [[value + [0] * (longest - len(value)) for value in row] for row in rows]
    ids, segment, position, weight = (torch.tensor([row[i] for row in padded]) for i in range(4))
    same = segment[:, :, None] == segment[:, None, :]
    seen = (same | (segment == 0)[:, None, :]) & torch.ones(longest, longest).tril().bool()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return ids, mask[:, None], position, weight


def vlm_loss(model, tokenizer, images, conversations):
    """Weighted cross-entropy of all answers; and the accuracy of the yes/no verdicts."""
    ids, mask, position, weight = pack(tokenizer, conversations)
    hidden = model.model(
        input_ids=ids,
        pixel_values=to_tensor(images),
        attention_mask=mask,
        position_ids=position,
        use_cache=False,
    ).last_hidden_state
    chosen = weight[:, :-1] > 0
    logits = model.lm_head(hidden[:, :-1][chosen])
    targets = ids[:, 1:][chosen]
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    verdicts = torch.isin(targets, torch.tensor(tokenizer.convert_tokens_to_ids(["yes", "no"])))
    right = (logits.argmax(-1) == targets).float()
    weights = weight[:, :-1][chosen]
    shown = {
        "verdicts": f"{right[verdicts].mean().item():.3f}",
        "others": f"{right[~verdicts].mean().item():.3f}",
    }
    return (losses * weights).sum() / weights.sum(), shown


def train_vlm(steps=8000):
    """Seeing first (lists and places alone for a tenth of the steps), then every question."""
    model, processor = models.build_vlm(questions.vocabulary(), SEED)

    def loss_of(rng, step):
        pictures, conversations = [], []
        for _ in range(24):
            image, graph = questions.faulty_picture(rng)
            pictures.append((image, graph))
        images = np.stack([image for image, _ in pictures])
        for things, (_, graph) in zip(world.parse(images), pictures):
            asked = list(questions.drill(rng, things))
            if step > steps / 10:
                asked += questions.questions(rng, things, graph)
            conversations.append(asked)
        return vlm_loss(model, processor.tokenizer, images, conversations)

    def save():
        model.save_pretrained(WORK / "vlm" / "model")
        processor.save_pretrained(WORK / "vlm" / "model")

    fit("vlm", model, loss_of, steps, VLM_RATE, save)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", default=["vae", "flow", "vlm"])
    arguments = parser.parse_args()
    for stage in arguments.stages:
        {"vae": train_vae, "flow": train_flow, "vlm": train_vlm}[stage]()
