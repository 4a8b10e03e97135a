"""Trains the embedded models on the CPU: `python tiny/make/pretrain.py`.

Four stages, each seeded and resumable (a run that was killed goes on from its last checkpoint):

    vae       autoencoder of 32 x 32 pictures
    flow      rectified-flow transformer with its text encoders: text-to-image and editing at once
    pictures  what the flow model generates and edits for training prompts
    vlm       LLaVA-type model, Checker and Actor: on drawn pictures first, then on those as well

About two hours on two CPU cores, reckoned from the pace of its parts. `python tiny/make/quality.py`
measures the result.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from diffusers import AutoencoderKL, FluxKontextPipeline
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT)]
import lessons
import models
import questions
import world
from fit import SEED, WORK, fit
from packing import to_tensor, vlm_loss

from diffuser import Diffuser
from editor import Editor
from sgiou import SceneGraph

SHIPPED = HERE.parent / "models"
DRAWN, EDITED = 72, 40  # lessons a step
GARBLED = 0.15  # share of relation words in captions that are drawn anew, at random
FLOW_RATE = 1e-3
CROWDS = (1, 6, 3, 2), (1, 3, 4, 4)  # weights of one to four things, before and after step 600
VLM_RATE = 1e-3
FINDING = 2000  # step up to which the VLM sees pictures of two things
SEEING = 3000  # step up to which it does the drill alone


def train_vae(steps=2500):
    """Mean absolute plus squared error, a little noise on the latents and a little KL."""
    vae = models.build_pipeline(SEED).vae.train()

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

    fit("vae", vae, loss_of, steps, 2e-3, save, last=1 / 3, muon=8.0)


def train_flow(steps=2000):
    """Flow matching, v = noise - latents, on captions and on edits."""
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
        crowds = CROWDS[step >= 600]
        pictures = [lessons.captioned_picture(rng, GARBLED, crowds) for _ in range(DRAWN)]
        edits = [lessons.edit(rng) for _ in range(EDITED)]
        scenes = [things for things, _ in pictures]
        scenes += [things for things, _, _ in edits] + [things for _, _, things in edits]
        composed, before, after = encode(scenes).split((DRAWN, EDITED, EDITED))
        picture = flow_loss(composed, [caption for _, caption in pictures], 12)
        change = flow_loss(after, [text for _, text, _ in edits], 8, before)
        shown = {"picture": f"{picture.item():.3f}", "edit": f"{change.item():.3f}"}
        return (DRAWN * picture + EDITED * change) / (DRAWN + EDITED), shown

    def save():
        # Half precision halves the folder; it is loaded as fp32 on a CPU.
        vae.register_to_config(_name_or_path="")  # where it lay on this machine is of no use
        pipeline.to(dtype=torch.float16).save_pretrained(SHIPPED / "flow")

    fit("flow", trained, loss_of, steps, FLOW_RATE, save, last=0.2, muon=8.0)


def make_pictures(prompts=3000):
    """What the Diffuser draws, and the Editor after model instructions, for training prompts."""
    pipeline = FluxKontextPipeline.from_pretrained(SHIPPED / "flow", torch_dtype=torch.float32)
    config = yaml.safe_load((ROOT / "eval.yaml").read_text())
    rng = random.Random(SEED)
    graphs = []
    while len(graphs) < prompts:
        things = world.random_scene(rng, rng.choices((2, 3, 4), (2, 4, 4))[0])
        triples = world.random_triples(rng, things)
        if triples:
            graphs.append(SceneGraph([thing.name for thing in things], triples))
    seeds = list(range(prompts))
    diffuser = Diffuser(pipeline, config["diffuser"]["call"])
    images = diffuser.generate([graph.prompt() for graph in graphs], seeds)
    found = world.parse(images)
    texts = [questions.sound_repair(rng, t, g)[1] for t, g in zip(found, graphs)]
    flawed = [number for number in seeds if texts[number] != "none"]
    editor = Editor(pipeline, config["editor"]["call"])
    images += editor.edit(
        [images[n] for n in flawed], [texts[n] for n in flawed], [n + prompts for n in flawed]
    )
    graphs += [graphs[n] for n in flawed]
    (WORK / "pictures").mkdir(parents=True, exist_ok=True)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    save_file({"pixels": pixels}, WORK / "pictures" / "pixels.safetensors")
    triples = json.dumps([graph.triples for graph in graphs])
    (WORK / "pictures" / "triples.json").write_text(triples)
    print(f"pictures: {prompts} generated, {len(flawed)} edited")


def train_vlm(steps=6500):
    """Finding first, then the drill, then every question."""
    model, processor = models.build_vlm(questions.vocabulary(), SEED)
    pixels = load_file(WORK / "pictures" / "pixels.safetensors")["pixels"].numpy()
    pool = []
    for image, triples in zip(pixels, json.loads((WORK / "pictures" / "triples.json").read_text())):
        names = dict.fromkeys(name for a, _, b in triples for name in (a, b))
        pool.append((image, SceneGraph(names, triples)))

    def loss_of(rng, step):
        if step < FINDING:
            scenes = [world.random_scene(rng, 2) for _ in range(16)]
            images = np.stack([world.render(things) for things in scenes])
            asked = [list(questions.finding(rng, things)) for things in scenes]
            return vlm_loss(model, processor.tokenizer, images, asked)
        drawn, generated = (24, 0) if step < SEEING else (8, 8)
        pictures = [questions.faulty_picture(rng) for _ in range(drawn)]
        pictures += rng.sample(pool, generated)
        images = np.stack([image for image, _ in pictures])
        # Drill and long answers come by turns: a batch of like lengths wastes little padding.
        writing = rng.choice(("extract", "repair", "repair", None))
        conversations = []
        for things, (_, graph) in zip(world.parse(images), pictures):
            if step < SEEING:
                conversations.append(list(questions.drill(rng, things)))
            else:
                conversations.append(list(questions.questions(rng, things, graph, writing)))
        return vlm_loss(model, processor.tokenizer, images, conversations)

    def save():
        model.half().save_pretrained(SHIPPED / "vlm")
        processor.save_pretrained(SHIPPED / "vlm")

    fit("vlm", model, loss_of, steps, VLM_RATE, save, last=0.25, muon=2.0)


STAGES = {"vae": train_vae, "flow": train_flow, "pictures": make_pictures, "vlm": train_vlm}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", help="which (default: all, in this order)")
    arguments = parser.parse_args()
    if unknown := set(arguments.stages) - set(STAGES):
        parser.error(f"unknown stage {', '.join(unknown)}; known: {', '.join(STAGES)}")
    for stage in arguments.stages or STAGES:
        STAGES[stage]()
