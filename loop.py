"""Generate-Reflect-Edit: the loop of RL-RIG (arXiv 2602.19974), composed of its four parts.

    image = diffuser.generate(prompt)
    reflection = checker.check(image, scene_graph)
    repeat up to `rounds` times, until every P(yes) of the best image is at least 1/2:
        image, reflection = the best-scored ones so far
        instruction = actor.propose(image, prompt, reflection.feedback, tried)
        image = editor.edit(image, instruction)
        reflection = checker.check(image, scene_graph)
    the answer is the best-scored image of the trajectory, not the last one

`Loop` does this, `build` loads the parts, and `main` is the command line:

    python loop.py "red circle left of blue square; green triangle above red circle" --seed 3
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C ends it at once, without a traceback even during the imports
    signal.signal(signal.SIGINT, signal.SIG_DFL)
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # or idle threads would slow other processes down

import argparse
import functools
import hashlib
import logging
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path

from tqdm import tqdm

from config import LoopConfig, RunFolder, check, load_config
from report import record, remove_images, save_images, say, story
from sgiou import SceneGraph, load_graphs, parse_prompt

PROMPTS_PER_BATCH = 32  # of a file of prompts; images are written after each batch
ATTEMPTS = 8  # completions sampled, at most, to get an instruction not yet tried on the image
HOTTER = 1.25  # factor on the temperature from one attempt to the next


@dataclass
class Step:
    """The generated image, or what a round made. A round without an edit repeats the best image."""

    image: object  # PIL image
    reflection: object  # the Checker's `Reflection` on it
    source: int | None = None  # index of the step that the round started from; None: generated
    thought: str = ""
    instruction: str | None = None  # None: malformed (or generated); "none": no edit wanted
    repeated: bool = False  # it was tried on this image before, so it was not carried out
    attempts: int = 1  # how often the Actor was asked

    @property
    def is_edit(self):
        return self.instruction not in (None, "none") and not self.repeated


@dataclass
class Trajectory:
    """All images made for one scene graph, in order."""

    graph: SceneGraph
    seed: int
    steps: list[Step]

    @property
    def best_index(self):
        """Index of the best-scored step, the earliest of equals. The next edit starts from it."""
        return max(range(len(self.steps)), key=lambda index: self.steps[index].reflection.score)

    @property
    def best(self):
        """The best-scored step: the answer."""
        return self.steps[self.best_index]

    @property
    def tried(self):
        """Instructions tried on the best image. If one had helped, another image would be best."""
        best = self.best_index
        return [step.instruction for step in self.steps if step.is_edit and step.source == best]

    @property
    def step_seed(self):
        """Seed of the next step. It depends on this trajectory alone, not on the batch."""
        return self.seed + 1_000_003 * len(self.steps)


@dataclass
class Loop:
    """The four parts, composed."""

    diffuser: object
    checker: object
    actor: object
    editor: object
    rounds: int = 3  # a trajectory has at most this many edits

    def run(self, graphs, seeds, images=None):
        """Generate, then reflect and edit. Args: `SceneGraph`s and a seed each. -> Trajectories.

        images: to start from, in RGB, instead of generated ones. Raises ValueError for a prompt
        that the Diffuser cannot read.
        """
        for graph in graphs:
            if problem := self.diffuser.problem(graph.prompt()):
                raise ValueError(f"prompt {graph.prompt()!r}: {problem}")
        trajectories = self.start(graphs, seeds, images)
        for _ in tqdm(range(self.rounds), "rounds", leave=False, disable=None):
            self.advance(trajectories)
        return trajectories

    def start(self, graphs, seeds, images=None):
        """Generate, unless images are given, and reflect: trajectories of one step."""
        if images is None:
            images = self.diffuser.generate([graph.prompt() for graph in graphs], seeds)
        reflections = self.checker.check(images, graphs)
        return [
            Trajectory(graph, seed, [Step(image, reflection)])
            for graph, seed, image, reflection in zip(
                graphs, seeds, images, reflections, strict=True
            )
        ]

    def advance(self, trajectories):
        """One round, in place: one more step where the best image does not satisfy the Checker."""
        active = [t for t in trajectories if not t.best.reflection.satisfied]
        if not active:
            return
        edits, graphs, seeds = [], [], []  # of the steps that change an image
        for t, (thought, instruction, attempts) in zip(active, self.propose(active)):
            best, repeated = t.best, instruction in t.tried
            # The step repeats the best image. If it is an edit, the end of this function puts the
            # edited image in its place.
            step = Step(
                best.image, best.reflection, t.best_index, thought, instruction, repeated, attempts
            )
            if step.is_edit:
                edits.append(step)
                graphs.append(t.graph)
                seeds.append(t.step_seed)
            t.steps.append(step)  # changes `step_seed`
        instructions = [step.instruction for step in edits]
        images = self.editor.edit([step.image for step in edits], instructions, seeds)
        reflections = self.checker.check(images, graphs)
        for step, image, reflection in zip(edits, images, reflections, strict=True):
            step.image, step.reflection = image, reflection

    def propose(self, trajectories):
        """A (thought, instruction, attempts) for the best image of each trajectory.

        No instruction is carried out twice on the same image. If the Actor repeats one that was
        tried, it is asked again, up to `ATTEMPTS` times in all, and the last completion stays.
        Each attempt is hotter, because a trained Actor has little entropy and would write the same
        again.
        """
        proposed = [None] * len(trajectories)
        pending = range(len(trajectories))
        for attempt in range(ATTEMPTS):
            asked = [trajectories[i] for i in pending]
            answers = self.actor.propose(
                [t.best.image for t in asked],
                [t.graph.prompt() for t in asked],
                [t.best.reflection.feedback for t in asked],
                seeds=[t.step_seed * ATTEMPTS + attempt for t in asked],
                tried=[t.tried for t in asked],
                temperature=self.actor.temperature * HOTTER**attempt,
            )
            for i, thought, instruction in zip(pending, answers.thoughts, answers.instructions):
                proposed[i] = thought, instruction, attempt + 1
            texts = zip(pending, answers.instructions)
            pending = [i for i, text in texts if text in trajectories[i].tried]
            if not pending:
                break
        return proposed


def build(config):
    """Load the four parts of a `LoopConfig`; skip this on a first reading.

    Parts with equal settings share one model. Raises ValueError, naming the key, for anything that
    cannot be loaded.
    """
    # Without torchvision, transformers would warn at every import.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import diffusers
    import torch
    import transformers

    from actor import Actor
    from checker import VLM, Checker
    from diffuser import Diffuser, check_call
    from editor import Editor

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if config.offload and not torch.cuda.is_available():
        raise ValueError("key 'offload': there is no CUDA GPU; leave it out")
    with naming(config, "editor.model"):
        Editor.check(config.editor.model)  # fail early, before loading weights

    @functools.cache  # equal arguments give the same model again
    def load_once(kind, model, device, dtype, *attention):
        if kind is Diffuser and config.offload:
            device = "cpu"  # its models wait in main memory for their turn on the GPU
        check_sums(model)
        return kind.load(model, device, dtype, *attention)

    def load(name, kind, *attention):
        with naming(config, f"{name}.device"):
            device, dtype = device_and_dtype(getattr(config, name))
        with naming(config, f"{name}.model"):
            return load_once(kind, getattr(config, name).model, device, dtype, *attention)

    vlm = load("checker", VLM, config.checker.attention)
    with naming(config, "checker.model"):
        checker = Checker(vlm.model, vlm.processor, config.checker.batch_size)
        checker.probe()

    settings = config.actor
    vlm = load("actor", VLM, settings.attention)
    with naming(config, "actor.model"):
        actor = Actor(
            vlm.model,
            vlm.processor,
            settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            checkpointing=settings.checkpointing,
        )
        actor.probe()

    settings = config.diffuser
    pipeline = load("diffuser", Diffuser).pipeline
    diffuser = Diffuser(pipeline, settings.call, settings.batch_size)
    check_call("diffuser.call", type(pipeline), diffuser.call)

    settings = config.editor
    pipeline = load("editor", Diffuser).pipeline  # `Diffuser.load` reads any pipeline
    editor = Editor(pipeline, settings.call, settings.batch_size, settings.template)
    check_call("editor.call", type(pipeline), editor.call)

    dtypes = (vlm.model.dtype, editor.pipeline.transformer.dtype)
    if torch.bfloat16 in dtypes and torch.cuda.is_available():
        # LoRA adapters are in fp32 all the same. TF32 makes their products faster on a GPU, and is
        # finer than bf16.
        torch.set_float32_matmul_precision("high")

    for name, part in (("actor", actor), ("editor", editor)):
        if folder := getattr(config, name).adapter:
            with naming(config, f"{name}.adapter"):
                check_sums(folder)
                part.load_adapter(folder)
    if config.editor.checkpointing:
        editor.pipeline.transformer.enable_gradient_checkpointing()
    if config.offload:
        for part, settings in ((diffuser, config.diffuser), (editor, config.editor)):
            part.pipeline.enable_model_cpu_offload(device=device_and_dtype(settings)[0])
    # From here on diffusers may say, once, that it ignores an argument of a call.
    diffusers.utils.logging.set_verbosity_warning()
    logging.getLogger("diffusers").handlers[0].addFilter(once_per_place())
    return Loop(diffuser, checker, actor, editor, config.rounds)


@contextmanager
def naming(config, key):
    """Put the config key and its value into the message of whatever goes wrong inside."""
    try:
        yield
    except Exception as error:
        value = functools.reduce(getattr, key.split("."), config)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if "no adapter of" in reason:
            reason += "; the Actor takes adapters of phase 1, the Editor those of phase 2"
        raise ValueError(f"key '{key}': cannot load {value!r}: {reason}") from None


def device_and_dtype(part):
    """Device and dtype of a part by name. Raises what torch raises if there is no such device."""
    import torch

    device, dtype = part.device, part.dtype
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    torch.empty(1, device=device)
    return device, dtype


def sha256_sums(folder):
    """The files of a model or an adapter with their sha256, in the format of sha256sum."""
    files = sorted(p for p in Path(folder).rglob("*.*") if p.suffix in (".json", ".safetensors"))
    names = [path.relative_to(folder).as_posix() for path in files]
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return "".join(f"{sum}  {name}\n" for sum, name in zip(sums, names))


def check_sums(folder):
    """Raise ValueError if a file differs from what SHA256SUMS says, where a folder has one."""
    sums = Path(folder) / "SHA256SUMS"
    if not sums.exists():
        return
    if not set(sums.read_text().splitlines()) <= set(sha256_sums(folder).splitlines()):
        raise ValueError(
            f"{sums} does not match: a file is damaged or was changed; get it again, or remove "
            "SHA256SUMS if the change is yours"
        )


def once_per_place():
    """A filter for logging: one message per line of code that logs.

    It drops messages about truncated prompts: `Diffuser.problem` has fewer false alarms.
    """
    seen = set()

    def is_new(record):
        place = record.pathname, record.lineno
        known = place in seen
        seen.add(place)
        return not known and "truncated" not in str(record.msg)

    return is_new


LOCKS = {}  # folder -> the locked file in it, of the folders that this process writes to


def lock(folder):
    """Lock a folder until `unlock`, or until this process ends for any reason.

    Raises ValueError if another process holds it. In one process (a notebook) it may be taken anew.
    """
    if folder.resolve() in LOCKS:
        return
    file = open(folder / "lock", "a+")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        LOCKS[folder.resolve()] = file
        file.truncate(0)
        file.write(f"pid {os.getpid()}\n")
        file.flush()
    except (BlockingIOError, PermissionError):
        file.seek(0)
        reason = f"another process is writing to this folder ({file.read().strip()})"
        raise ValueError(f"{folder}: {reason}") from None
    except (ImportError, OSError):
        pass  # Windows and some network file systems have no locks; a full disk has no room


def unlock(folder):
    if file := LOCKS.pop(folder.resolve(), None):
        file.close()


def open_image(path):
    """A PIL image in RGB. Raises ValueError if the file holds none."""
    from PIL import Image

    from checker import normalize_image

    try:
        return normalize_image(Image.open(path))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"--image: {path}: {error}; give a PNG or JPEG file") from None


def output_folder(path, *foreign):
    """Make a folder for results, and lock it until this process ends.

    Raises ValueError if it holds a run, or `foreign` files.
    """
    folder = Path(check(RunFolder, path, "--out", ""))
    for name in ("checkpoint.safetensors", "metrics.jsonl", *foreign):
        if (folder / name).exists():
            raise ValueError(f"--out: {folder} holds another run ({name}); name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
    except OSError as error:
        raise ValueError(f"--out: {error}; name another folder") from None
    return folder


def main():
    parser = argparse.ArgumentParser(description="Generate-Reflect-Edit: prompts in, images out.")
    parser.add_argument("prompt", nargs="*", help='"red circle left of ...", key=value')
    parser.add_argument(
        "--prompts", type=expanduser, help="a file of prompts instead, see sgiou.load_graphs"
    )
    parser.add_argument("--config", default="eval.yaml", help="the models (default: eval.yaml)")
    parser.add_argument(
        "--image", type=expanduser, help="start from this file instead of a generated image"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt")
    parser.add_argument("--out", default="out", help="folder for images and report")
    arguments, unknown = parser.parse_known_intermixed_args()
    if unknown:
        parser.error(f"{unknown[0]} is no option; values of the YAML file are set as rounds=1")
    overrides = [word for word in arguments.prompt if re.match(r"[\w.]+=", word)]
    prompts = [word for word in arguments.prompt if word not in overrides]
    if len(prompts) != (0 if arguments.prompts else 1):
        parser.error(f"give one prompt in quotes or --prompts FILE, and key=value; got {prompts}")
    if arguments.image and arguments.prompts:
        parser.error("--image goes with a prompt, not with --prompts")
    try:
        if not 0 <= arguments.seed < 2**31:
            raise ValueError("--seed: make it 0 or more and below 2**31")
        # "evaluation=": the test prompts of the config are not needed here, so may be missing.
        config = load_config(arguments.config, LoopConfig, [*overrides, "evaluation="])
        graphs = [parse_prompt(prompt, config.relations) for prompt in prompts]
        graphs = graphs or load_graphs(arguments.prompts, config.relations)
        images = [open_image(arguments.image)] if arguments.image else None
        out = output_folder(arguments.out, "results.json")
        if images and Path(arguments.image).resolve().parent == out.resolve():
            if Path(arguments.image).stem.isdecimal():
                raise ValueError(f"--image: {arguments.image} would be replaced; set another --out")
        loop = build(config)
        if arguments.prompts:
            graphs = loop.diffuser.readable(graphs, arguments.prompts)
        seeds = [arguments.seed + number for number in range(len(graphs))]
        trajectories = []
        for first in range(0, len(graphs), PROMPTS_PER_BATCH):
            part = slice(first, first + PROMPTS_PER_BATCH)
            made = loop.run(graphs[part], seeds[part], images)
            if first == 0:
                remove_images(out)  # of an earlier run
            for trajectory in made:
                folder = out / f"{len(trajectories):04d}" if len(graphs) > 1 else out
                save_images(trajectory, folder)
                say(f"{story(trajectory)}\n\n  {folder / 'strip.png'}\n")
                trajectories.append(trajectory)
            done = len(trajectories)
            batches = -(-done // PROMPTS_PER_BATCH)
            # The page shows all of them, so it is made anew only after 1, 2, 4, 8, ... batches.
            if done == len(graphs) or batches.bit_count() == 1:
                say(f"  {done} of {len(graphs)} prompts: {record(out, trajectories)}")
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, OSError) and arguments.out not in str(error):  # of a full disk
            error = f"{arguments.out}: {error}"
        sys.exit(" ".join(f"loop.py: {error}".split()))


if __name__ == "__main__":
    main()
