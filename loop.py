"""Generate-Reflect-Edit: the loop of RL-RIG (arXiv 2602.19974).

image = diffuser.generate(prompt)
reflection = checker.check(image)
repeat up to `rounds` times, until the best image so far satisfies the Checker:
    image, reflection = the best-scored so far
    thought, instruction = actor.propose(image, prompt, feedback of the reflection)
    image = editor.edit(image, instruction)
    reflection = checker.check(image)
the answer is the best-scored image of the trajectory, not the last one

python loop.py "red circle left of blue square; green triangle above red circle" --seed 3
"""

import argparse
import difflib
import functools
import inspect
import logging
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from config import LoopConfig, load_config
from report import record, save_images, story
from sgiou import SceneGraph, load_laion_sg, parse_prompt

TOGETHER = 32  # prompts of a file that run as one batch before their images are written


@dataclass
class Step:
    """One image of a trajectory, and the edit that made it."""

    image: object  # PIL image
    reflection: object  # the Checker's `Reflection` on it
    source: int | None = None  # index of the step whose image was edited; None: it was generated
    thought: str = ""
    # "none" means that the Actor wanted no edit, None that its completion was malformed. Both leave
    # the image as it was.
    instruction: str | None = None

    @property
    def edited(self):
        return self.instruction not in (None, "none")


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


class Loop:
    """The four parts, composed. rounds: the most edits of a trajectory."""

    def __init__(self, diffuser, checker, actor, editor, rounds=3):
        self.diffuser = diffuser
        self.checker = checker
        self.actor = actor
        self.editor = editor
        self.rounds = rounds

    def run(self, graphs, seeds):
        """Generate, then reflect and edit. Args: `SceneGraph`s and a seed each. -> Trajectories."""
        trajectories = self.start(graphs, seeds)
        for _ in range(self.rounds):
            self.advance(trajectories)
        return trajectories

    def start(self, graphs, seeds):
        """Generate and reflect: trajectories of one step."""
        images = self.diffuser.generate([graph.prompt() for graph in graphs], seeds)
        check_size("diffuser.call", self.diffuser.call, images)
        reflections = self.checker.check(images, graphs)
        return [
            Trajectory(graph, seed, [Step(image, reflection)])
            for graph, seed, image, reflection in zip(graphs, seeds, images, reflections)
        ]

    def advance(self, trajectories):
        """One round, in place: every trajectory that is not satisfied yet gets one more step."""
        active = [t for t in trajectories if not t.best.reflection.satisfied]
        if not active:
            return
        proposals = self.actor.propose(
            [t.best.image for t in active],
            [t.graph.prompt() for t in active],
            [t.best.reflection.feedback for t in active],
            seed=active[0].seed * 1000 + len(active[0].steps),
        )
        edited = []
        for t, thought, instruction in zip(active, proposals.thoughts, proposals.instructions):
            source = t.best
            step = Step(source.image, source.reflection, t.best_index, thought, instruction)
            if step.edited:
                edited.append((t, step))
            else:
                t.steps.append(step)
        images = self.editor.edit(
            [step.image for _, step in edited],
            [step.instruction for _, step in edited],
            [t.seed + 1_000_003 * len(t.steps) for t, _ in edited],
        )
        check_size("editor.call", self.editor.call, images)
        reflections = self.checker.check(images, [t.graph for t, _ in edited])
        for (t, step), image, reflection in zip(edited, images, reflections):
            step.image, step.reflection = image, reflection
            t.steps.append(step)


def build(config):
    """Load the four parts of a `LoopConfig`; parts with the same model share its weights.

    Raises ValueError, naming the key, for anything that cannot be loaded.
    """
    # Without torchvision transformers would warn at every import that it falls back to PIL.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    import diffusers
    import torch
    import transformers

    from actor import Actor
    from checker import Checker
    from diffuser import Diffuser
    from editor import Editor

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if config.offload and not torch.cuda.is_available():
        raise ValueError("key 'offload': there is no CUDA GPU; leave it out")
    # Fail early, before loading weights: a pipeline may not work as the Editor, and a processor may
    # need torchvision.
    _named("editor.model", Editor.check, config.editor.model)
    for name in ("checker", "actor"):
        model = getattr(config, name).model
        _named(f"{name}.model", transformers.AutoProcessor.from_pretrained, model)

    loaded = {}  # weights by (model, device, dtype)

    def load(kind, name, **settings):
        part = getattr(config, name)
        weights = (part.model, *device_and_dtype(part))
        settings["batch_size"] = part.batch_size
        if weights not in loaded:
            loader = Diffuser if kind is Editor else kind
            made = _named(f"{name}.model", loader.load, *weights)
            is_pipeline = hasattr(made, "pipeline")
            loaded[weights] = (made.pipeline,) if is_pipeline else (made.model, made.processor)
        return kind(*loaded[weights], **settings)

    diffuser = load(Diffuser, "diffuser", call=config.diffuser.call)
    editor = load(Editor, "editor", call=config.editor.call, template=config.editor.template)
    checker = load(Checker, "checker")
    actor = load(
        Actor,
        "actor",
        max_new_tokens=config.actor.max_new_tokens,
        temperature=config.actor.temperature,
        recompute=config.actor.checkpointing,
    )
    check_call("diffuser.call", type(diffuser.pipeline), diffuser.call)
    check_call("editor.call", type(editor.pipeline), editor.call)
    for name, part in (("actor", actor), ("editor", editor)):
        if folder := getattr(config, name).adapter:
            _named(f"{name}.adapter", part.load_adapter, folder)
    if config.editor.checkpointing:
        editor.pipeline.transformer.enable_gradient_checkpointing()
    if config.offload:
        for pipeline in {diffuser.pipeline, editor.pipeline}:
            pipeline.enable_model_cpu_offload()  # text encoders, transformer, VAE in turn
            pipeline.transformer.to("cuda")  # where Adam's state of a resumed run has to be
    # From here on diffusers may say, once, that it ignores an argument of a call.
    diffusers.utils.logging.set_verbosity_warning()
    logging.getLogger("diffusers").handlers[0].addFilter(first_of_its_place())
    return Loop(diffuser, checker, actor, editor, config.rounds)


def check_call(key, kind, call):
    """Compare the arguments of a pipeline's call with the signature of its class.

    Raises ValueError for one that is unknown, of another type than its default, or without effect.
    Dictionaries are refused because no pipeline checks their keys, tensors because YAML has none.
    """
    takes = inspect.signature(kind.__call__).parameters
    for name, value in call.items():
        if name not in takes or re.search("embeds|latents|callback", name):
            near = difflib.get_close_matches(name, takes.keys() - {name}, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"key '{key}': {kind.__name__} takes no {name} from a file{hint}")
        default = takes[name].default
        fits = {float: (int, float), tuple: (list, tuple), type(None): (int, float, str, list)}
        fits = (list,) if name == "sigmas" else fits.get(type(default), (type(default),))
        # Not isinstance, which takes True for an int.
        if (type(value) not in fits and value is not default) or value == []:
            wanted = " or ".join(each.__name__ for each in fits)
            raise ValueError(f"key '{key}.{name}' is {value!r:.100}; make it {wanted}")
    steps = len(call.get("sigmas") or ())
    if steps and call.get("num_inference_steps", steps) != steps:
        raise ValueError(f"key '{key}': sigmas are {steps} steps; leave num_inference_steps out")
    if "true_cfg_scale" in takes:
        negative = any(call[name] is not None for name in call if name.startswith("negative_pr"))
        default = takes["true_cfg_scale"].default if negative else 1
        guided = call.get("true_cfg_scale", default) > 1
        if (guided or negative) and not (guided and call.get("negative_prompt") is not None):
            raise ValueError(
                f"key '{key}': true_cfg_scale above 1 and negative_prompt have no effect without "
                "each other; give both or neither"
            )


def check_size(key, call, images):
    """Say, once, that a pipeline makes images of another size than its call asks for."""
    asked = call.get("width"), call.get("height")
    if images and all(asked) and images[0].size != asked:
        made = " x ".join(map(str, images[0].size))
        warn_once(
            f"key '{key}': asked for {asked[0]} x {asked[1]} pixels (width x height), and the "
            f"images have {made}; ask for a size that the model makes"
        )


@functools.cache
def warn_once(message):
    print(message, file=sys.stderr)


def first_of_its_place():
    """A filter for logging that lets through one message per line of code that logs."""
    seen = set()

    def is_first(record):
        place = record.pathname, record.lineno
        return not (place in seen or seen.add(place))

    return is_first


def device_and_dtype(part):
    """What "auto" stands for: CUDA in bfloat16 if there is a GPU, otherwise the CPU in float32."""
    import torch

    device, dtype = part.device, part.dtype
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return device, dtype


def _named(key, load, path, *more, **settings):
    """`load(path, ...)`, with the config key in the error message of whatever goes wrong."""
    try:
        return load(path, *more, **settings)
    except Exception as error:  # of any kind: it comes from the depths of three libraries
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"key '{key}': cannot load {path!r}: {reason}") from None


def read_prompts(path, relations):
    """Scene graphs from a LAION-SG file (.json) or a text file with one prompt per line."""
    if path.endswith(".json"):
        return load_laion_sg(path)
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); check the path") from None
    graphs = []
    for number, line in enumerate(lines, 1):
        try:
            graphs += [parse_prompt(line, relations)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not graphs:
        raise ValueError(f"{path}: holds no prompt; write one per line")
    return graphs


def main():
    parser = argparse.ArgumentParser(description="Generate-Reflect-Edit: prompts in, images out.")
    parser.add_argument(
        "prompt", nargs="*", help='"red circle left of blue square; ...", key=value'
    )
    parser.add_argument("--prompts", help="a file instead: one prompt per line, or LAION-SG JSON")
    parser.add_argument("--config", default="eval.yaml", help="the models (default: eval.yaml)")
    parser.add_argument("--rounds", type=int, help="most edits of an image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="out", help="folder for images and report")
    arguments = parser.parse_intermixed_args()
    overrides = [word for word in arguments.prompt if re.match(r"[a-z_.]+=", word)]
    prompts = [word for word in arguments.prompt if word not in overrides]
    if len(prompts) != (arguments.prompts is None):
        parser.error("give either a prompt or --prompts FILE")
    if arguments.rounds is not None:
        overrides.append(f"rounds={arguments.rounds}")
    try:
        config = load_config(arguments.config, LoopConfig, overrides)
        graphs = [parse_prompt(prompt, config.relations) for prompt in prompts]
        graphs = graphs or read_prompts(arguments.prompts, config.relations)
        loop = build(config)
        for graph in graphs:
            if problem := loop.diffuser.problem(graph.prompt()):
                raise ValueError(f"prompt {graph.prompt()!r}: {problem}")
        out = Path(arguments.out)
        trajectories = []
        for first in range(0, len(graphs), TOGETHER):
            part = graphs[first : first + TOGETHER]
            seeds = [arguments.seed + first + number for number in range(len(part))]
            for trajectory in loop.run(part, seeds):
                folder = out / f"{len(trajectories):04d}" if len(graphs) > 1 else out
                save_images(trajectory, folder)
                print(f"{story(trajectory)}\n\n  {folder / 'strip.png'}\n", flush=True)
                trajectories.append(trajectory)
            page = record(out, trajectories)
        print(f"  {page}")
    except (ValueError, OSError, RuntimeError, KeyboardInterrupt) as error:
        sys.exit(" ".join(f"loop.py: {str(error) or 'stopped'}".split()))


if __name__ == "__main__":
    main()
