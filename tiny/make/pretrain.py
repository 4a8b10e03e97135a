"""Trains the tiny models on the CPU: `python tiny/make/pretrain.py`.

Six stages. Each is seeded, and resumable: a run that was killed goes on from its last checkpoint.

    vae       autoencoder of 32 x 32 images
    flow      rectified-flow transformer with its text encoders: text-to-image and editing at once
    images    what the flow model generates and edits for training prompts
    see       LLaVA-type model, Checker and Actor, on drawn images alone
    vlm       the same model on drawn and generated images
    judge     a second such model from another seed, which only evaluates

Without arguments all of them run, `see` in a second process beside the first three, because it
needs nothing of them. A stage depends on its seed and on the stages before it alone, so this gives
the same weights as one after the other. One and a half to three hours on two CPU cores without the
judge. `python tiny/make/quality.py` measures the result.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # two processes of two threads each slow one another tenfold
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
from loop import sha256_sums
from sgiou import SceneGraph

SHIPPED = HERE.parent / "models"
LESSONS = (46, 42), (72, 20)  # of Diffuser and Editor a step, before and after step 750: the
# Editor, which sees most of its answer, learns much sooner
GARBLED = 0.15  # share of relation words in captions that are drawn anew, at random
FLOW_RATE = 1e-3
CROWDS = (1, 6, 3, 2, 0), (1, 2, 4, 4, 2)  # weights of one to five things, before and after 600
VLM_RATE = 1e-3
VLM_IMAGES = 24  # a step
FINDING = 1000  # step up to which the VLM sees images of two things
SEEING = 1500  # step up to which it does the drill alone
ASKING = 3250  # step from which on it no longer drills, and relation words weigh more


def write_sums(folder):
    """The checksums with which loop.py notices a damaged model."""
    (folder / "SHA256SUMS").write_text(sha256_sums(folder))


def train_vae(steps=1000):
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
        # Kontext's latents are (z - shift) * scale: standardize them over clean images.
        rng = random.Random(SEED)
        scenes = [world.random_scene(rng, rng.choice((2, 3, 4, 5))) for _ in range(512)]
        with torch.no_grad():
            posterior = vae.encode(to_tensor(np.stack([world.render(s) for s in scenes])))
        latents = posterior.latent_dist.mode()
        shift, scale = latents.mean().item(), 1 / latents.std().item()
        vae.register_to_config(shift_factor=shift, scaling_factor=scale)
        vae.save_pretrained(WORK / "vae" / "model")

    fit("vae", vae, loss_of, steps, 2e-3, save, last=1 / 2, muon=8.0)


def train_flow(steps=3400):
    """Flow matching, v = noise - latents, on captions and on edits."""
    pipeline = models.build_pipeline(SEED)
    pipeline.vae = AutoencoderKL.from_pretrained(WORK / "vae" / "model")
    vae, transformer = pipeline.vae.eval().requires_grad_(False), pipeline.transformer
    vae.encoder.to(memory_format=torch.channels_last)  # twice as fast
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
    context_ids[:, 0] = 1  # as the Kontext pipeline marks the tokens of the image to edit

    def encode(scenes):
        images = to_tensor(np.stack([world.render(things) for things in scenes]))
        images = images.contiguous(memory_format=torch.channels_last)
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
        drawn, edited = LESSONS[step >= 750]
        captioned = [lessons.captioned_image(rng, GARBLED, crowds) for _ in range(drawn)]
        edits = [lessons.edit(rng) for _ in range(edited)]
        scenes = [things for things, _ in captioned]
        scenes += [things for things, _, _ in edits] + [things for _, _, things in edits]
        composed, before, after = encode(scenes).split((drawn, edited, edited))
        captions = [caption for _, caption in captioned]
        drawing = flow_loss(composed, captions, models.PROMPT_TOKENS)
        instructions = [text for _, text, _ in edits]
        editing = flow_loss(after, instructions, models.INSTRUCTION_TOKENS, before)
        shown = {"drawing": f"{drawing.item():.3f}", "editing": f"{editing.item():.3f}"}
        return (drawn * drawing + edited * editing) / (drawn + edited), shown

    def save():
        # Half precision halves the folder; it is loaded as fp32 on a CPU.
        vae.register_to_config(_name_or_path="")  # where it was on this machine is of no use
        vae.to(memory_format=torch.contiguous_format)
        pipeline.to(dtype=torch.float16).save_pretrained(SHIPPED / "flow")
        write_sums(SHIPPED / "flow")

    fit("flow", trained, loss_of, steps, FLOW_RATE, save, last=0.35, muon=8.0)


def make_images(prompts=2000):
    """What the Diffuser draws for training prompts, edited twice by plausible instructions."""
    folder = WORK / "images"
    if (folder / "triples.json").exists():
        print(f"images: done before; delete {folder} to make them anew")
        return
    pipeline = FluxKontextPipeline.from_pretrained(SHIPPED / "flow", torch_dtype=torch.float32)
    config = yaml.safe_load((ROOT / "eval.yaml").read_text())
    rng = random.Random(SEED)
    graphs = []
    for number in range(prompts):
        things, triples = world.random_prompt(rng, 3 + number % 4)
        graphs.append(SceneGraph([thing.name for thing in things], triples))
    diffuser = Diffuser(pipeline, config["diffuser"]["call"])
    editor = Editor(pipeline, config["editor"]["call"])
    found = list(zip(diffuser.generate([g.prompt() for g in graphs], range(prompts)), graphs))
    latest = found
    for round_ in (1, 2):
        flawed = []
        for (image, graph), things in zip(latest, world.parse([image for image, _ in latest])):
            instruction = questions.repair(rng, things, graph)[1]
            if instruction != "none":
                flawed.append((image, graph, instruction))
        images, graphs, instructions = zip(*flawed)
        seeds = range(round_ * prompts, round_ * prompts + len(flawed))
        latest = list(zip(editor.edit(list(images), list(instructions), list(seeds)), graphs))
        found += latest
    folder.mkdir(parents=True, exist_ok=True)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image, _ in found]))
    save_file({"pixels": pixels}, folder / "pixels.safetensors")
    triples = json.dumps([graph.triples for _, graph in found])
    (folder / "triples.json").write_text(triples)
    print(f"images: {prompts} generated, {len(found) - prompts} edited")


def ask_everything(rng, model, processor, images, drilled):
    """The loss on all kinds of questions.

    Args: images: (array, `SceneGraph`) pairs; drilled: no more drill. By then all is learned but
    which relation word to write in a long answer.
    """
    # Drill and long answers take turns: a batch of equal lengths wastes little padding.
    kinds = ("extract", "extract", "repair")
    writing = rng.choice(kinds if drilled else (*kinds, "repair", None))
    short, emphasis = (3, 4.0) if drilled else (0, 1.0)
    pixels = np.stack([image for image, _ in images])
    asked = [
        list(questions.questions(rng, things, graph, writing, short))
        for things, (_, graph) in zip(world.parse(pixels), images)
    ]
    return vlm_loss(model, processor.tokenizer, pixels, asked, emphasis)


def train_see(seed=SEED, work=WORK, steps=3500):
    """Finding first, then the drill, then every question."""
    model, processor = models.build_vlm(questions.vocabulary(), seed)

    def loss_of(rng, step):
        if step < FINDING:
            scenes = [world.random_scene(rng, 2) for _ in range(VLM_IMAGES)]
            pixels = np.stack([world.render(things) for things in scenes])
            asked = [list(questions.finding(rng, things)) for things in scenes]
            for conversation in asked[::4]:
                conversation.append(questions.copying(rng))
            return vlm_loss(model, processor.tokenizer, pixels, asked)
        images = [questions.faulty_image(rng) for _ in range(VLM_IMAGES)]
        if step < SEEING:
            pixels = np.stack([image for image, _ in images])
            asked = [list(questions.drill(rng, things)) for things in world.parse(pixels)]
            return vlm_loss(model, processor.tokenizer, pixels, asked)
        return ask_everything(rng, model, processor, images, drilled=step >= ASKING)

    def save():
        save_file(model.state_dict(), work / "see" / "model.safetensors")

    fit("see", model, loss_of, steps, VLM_RATE, save, last=0, muon=2.0, seed=seed, work=work)


def train_vlm(name="vlm", seed=SEED, work=WORK, steps=2600):
    """Every question, on drawn images and twice as many generated ones. name: of the model."""
    model, processor = models.build_vlm(questions.vocabulary(), seed)
    model.load_state_dict(load_file(work / "see" / "model.safetensors"))
    pixels = load_file(WORK / "images" / "pixels.safetensors")["pixels"].numpy()
    pool = []
    for image, triples in zip(pixels, json.loads((WORK / "images" / "triples.json").read_text())):
        names = dict.fromkeys(name for a, _, b in triples for name in (a, b))
        pool.append((image, SceneGraph(names, triples)))

    def loss_of(rng, step):
        images = [questions.faulty_image(rng) for _ in range(5)] + rng.sample(pool, 11)
        return ask_everything(rng, model, processor, images, drilled=True)

    def save():
        model.half().save_pretrained(SHIPPED / name)
        processor.save_pretrained(SHIPPED / name)
        write_sums(SHIPPED / name)

    fit("vlm", model, loss_of, steps, VLM_RATE, save, last=0.6, muon=2.0, seed=seed, work=work)


def train_judge():
    """What `see` and `vlm` do, from another seed."""
    train_see(1, WORK / "judge")
    train_vlm("judge", 1, WORK / "judge", steps=1550)


STAGES = {
    "vae": train_vae,
    "flow": train_flow,
    "images": make_images,
    "see": train_see,
    "vlm": train_vlm,
    "judge": train_judge,
}


def everything():
    """All stages, `see` beside those that it does not need."""
    beside = subprocess.Popen([sys.executable, __file__, "see"])
    try:
        for stage in ("vae", "flow", "images"):
            STAGES[stage]()
        if beside.wait():
            sys.exit("stage see failed: its message is above")
    finally:
        beside.terminate()
    train_vlm()
    train_judge()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", help="which (default: all, in this order)")
    arguments = parser.parse_args()
    if unknown := set(arguments.stages) - set(STAGES):
        parser.error(f"unknown stage {', '.join(unknown)}; known: {', '.join(STAGES)}")
    for stage in arguments.stages:
        STAGES[stage]()
    if not arguments.stages:
        everything()
