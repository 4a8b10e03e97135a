"""Generate-Reflect-Edit: the loop of RL-RIG (arXiv 2602.19974).

    image = diffuser.generate(prompt)
    reflection = checker.check(image)
    repeat up to `rounds` times, unless the best image so far satisfies the Checker:
        image, reflection = the best-scored so far
        thought, instruction = actor.propose(image, prompt, reflection)
        image = editor.edit(image, instruction)
        reflection = checker.check(image)
    the answer is the best-scored image of the whole trajectory, never simply the last

`build` loads the parts, for training and evaluation too; those of the same model share its weights.

    python loop.py "red circle left of blue square; green triangle above red circle" rounds=2
"""

import argparse
import inspect
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from config import LoopConfig, load_config
from memory import checkpoint_vlm, take_turns, waiting
from report import record
from sgiou import SceneGraph, load_laion_sg, parse_prompt
from story import story, write


@dataclass
class Step:
    """One picture of a trajectory, and what the Actor then asked for (nothing, after the last)."""

    image: object  # PIL image
    reflection: object  # Checker's `Reflection`
    thought: str = ""
    instruction: str | None = None  # "none": the Actor wanted no edit; None: malformed, or last


@dataclass
class Trajectory:
    """All pictures made for one scene graph, in order."""

    graph: SceneGraph
    seed: int
    steps: list[Step]

    @property
    def best(self):
        """The answer: the best-scored step, the earliest of equals."""
        return self.steps[self.source(len(self.steps))]

    def source(self, number):
        """Index of the step whose picture was edited to make that of step `number` >= 1.

        It is the best of those before it: an edit that does harm is not built upon.
        """
        return max(range(number), key=lambda index: self.steps[index].reflection.score)


class Loop:
    """The four parts, composed. Args: the parts; rounds: most edits of a trajectory."""

    def __init__(self, diffuser, checker, actor, editor, rounds=3):
        self.diffuser = diffuser
        self.checker = checker
        self.actor = actor
        self.editor = editor
        self.rounds = rounds

    def run(self, graphs, seeds):
        """Generates, reflects and edits. Args: `SceneGraph`s and one seed each. -> Trajectories."""
        trajectories = self.start(graphs, seeds)
        for _ in range(self.rounds):
            self.advance(trajectories)
        return trajectories

    def start(self, graphs, seeds):
        """Generate and reflect: trajectories of one step."""
        images = self.diffuser.generate([graph.prompt() for graph in graphs], seeds)
        reflections = self.checker.check(images, graphs)
        return [
            Trajectory(graph, seed, [Step(image, reflection)])
            for graph, seed, image, reflection in zip(graphs, seeds, images, reflections)
        ]

    def advance(self, trajectories):
        """One round: edit and reflect on every trajectory whose best picture does not satisfy."""
        active = [t for t in trajectories if not t.best.reflection.satisfied]
        if not active:
            return
        sources = [t.best for t in active]
        proposals = self.actor.propose(
            [step.image for step in sources],
            [t.graph for t in active],
            [step.reflection for step in sources],
            seed=active[0].seed * 1000 + len(active[0].steps),
        )
        edited = []
        for trajectory, source, thought, instruction in zip(
            active, sources, proposals.thoughts, proposals.instructions
        ):
            trajectory.steps[-1].thought = thought
            trajectory.steps[-1].instruction = instruction
            if instruction in (None, "none"):
                trajectory.steps.append(Step(source.image, source.reflection))  # nothing was edited
            else:
                edited.append(trajectory)
        images = self.editor.edit(
            [t.best.image for t in edited],
            [t.steps[-1].instruction for t in edited],
            [t.seed + 1_000_003 * len(t.steps) for t in edited],
        )
        reflections = self.checker.check(images, [t.graph for t in edited])
        for trajectory, image, reflection in zip(edited, images, reflections):
            trajectory.steps.append(Step(image, reflection))


def build(config):
    """Loads the four parts of a `LoopConfig`; parts with the same model share its weights."""
    # Without torchvision transformers warns at every import that it falls back to PIL: as planned.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from transformers import AutoProcessor

    from actor import Actor
    from checker import Checker
    from checkpoint import check_adapter
    from diffuser import Diffuser
    from editor import Editor

    # What cannot be, is told before gigabytes are loaded: a processor may want torchvision.
    _try("editor.model", config.editor.model, Editor.check)
    _try("checker.model", config.checker.model, AutoProcessor.from_pretrained)
    _try("actor.model", config.actor.model, AutoProcessor.from_pretrained)
    config = waiting(config) if config.offload else config
    for_diffuser = _settings(config.diffuser, "call")
    for_editor = _settings(config.editor, "call", "template")
    for_checker = _settings(config.checker) | {"relations": config.relations}
    for_actor = _settings(config.actor, "max_new_tokens", "temperature")
    diffuser = _load(Diffuser, "diffuser", config.diffuser, for_diffuser)
    if _weights(config.editor) == _weights(config.diffuser):
        editor = Editor(diffuser.pipeline, **for_editor)
    else:
        editor = _load(Editor, "editor", config.editor, for_editor)
    checker = _load(Checker, "checker", config.checker, for_checker)
    if _weights(config.actor) == _weights(config.checker):
        actor = Actor(checker.model, checker.processor, **for_actor)
    else:
        actor = _load(Actor, "actor", config.actor, for_actor)
    for name, part in (("diffuser", diffuser), ("editor", editor)):
        kind = type(part.pipeline)
        if unknown := set(part.call) - set(inspect.signature(kind.__call__).parameters):
            raise ValueError(f"key '{name}.call': {kind.__name__} takes no {', '.join(unknown)}")
    for name, part in (("actor", actor), ("editor", editor)):
        if folder := getattr(config, name).adapter:
            _try(f"{name}.adapter", folder, part.load_adapter)
            _try(f"{name}.adapter", folder, check_adapter, part)
    if config.actor.checkpointing:
        checkpoint_vlm(actor.model)
    if config.editor.checkpointing:
        editor.pipeline.transformer.enable_gradient_checkpointing()
    if config.offload:
        take_turns((diffuser, checker, actor, editor), "cuda")
    return Loop(diffuser, checker, actor, editor, config.rounds)


def _weights(part):
    return (part.model, part.device, part.dtype)


def _settings(part, *names):
    return {name: getattr(part, name) for name in (*names, "batch_size")}


def _load(kind, name, part, settings):
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    return _try(f"{name}.model", part.model, kind.load, part.device, part.dtype, **settings)


def _try(key, path, load, *more, **settings):
    try:
        return load(path, *more, **settings)
    except Exception as error:  # of any kind: it comes from the depths of three libraries
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"key '{key}': cannot load {path!r}: {reason}") from None


def read_prompts(path, relations):
    """Scene graphs from a LAION-SG file (.json) or a text file, a prompt a line."""
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
        raise ValueError(f"{path}: holds no prompt; write one a line")
    return graphs


def main():
    parser = argparse.ArgumentParser(description="Generate-Reflect-Edit: prompts in, pictures out.")
    parser.add_argument("prompt", nargs="*", help='"red circle left of blue square; ..."')
    parser.add_argument("--prompts", help="a file instead: a prompt a line, or LAION-SG JSON")
    parser.add_argument("--config", default="eval.yaml", help="the models (default: eval.yaml)")
    parser.add_argument("--rounds", type=int, help="most edits of a picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="out", help="folder for pictures and stories")
    arguments = parser.parse_args()
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
        Path(arguments.out).mkdir(parents=True, exist_ok=True)
        trajectories = loop.run(graphs, [arguments.seed + n for n in range(len(graphs))])
        for number, trajectory in enumerate(trajectories):
            folder = Path(arguments.out) / (f"{number:04d}" if len(graphs) > 1 else "")
            write(trajectory, folder)
            print(story(trajectory), f"\n\n  {folder / 'strip.png'}\n")
        unread = f"\n  {loop.editor.misread} instructions were not read in full"
        print(f"  {record(arguments.out, trajectories)}" + unread * bool(loop.editor.misread))
    except (ValueError, OSError, RuntimeError, KeyboardInterrupt) as error:
        sys.exit(" ".join(f"loop.py: {str(error) or 'stopped'}".split()))


if __name__ == "__main__":
    main()
