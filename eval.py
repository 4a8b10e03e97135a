"""Evaluation: every row of the table on the same held-out prompts and the same seeds.

Rows, each with a 95% interval, paired by prompt, against the Diffuser alone and against the row it
builds on:

    Diffuser                one picture a prompt
    best of N               N pictures, the Checker's choice, at the full loop's compute
    1 round, loop           Generate-Reflect-Edit, one edit or all, untrained
    ... + phase 1, + 2      with the Actor's trained adapter, and with the Editor's too

Columns: SG-IoU, Entity-IoU and Relation-IoU after LAION-SG (arXiv 2412.08580), by the pixel parser
(embedded world only) and by the VLM's extraction; the VLM as a judge; the share of things that an
instruction does not name and that survive its edit; edits, flow-model evaluations and seconds a
prompt. Compute is counted in tokens through the flow model, text and context image included.

    python eval.py                # the first 300 test prompts of eval.yaml
    python eval.py --full         # all of them
"""

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from config import LoopConfig, load_config
from loop import Step, Trajectory, build
from report import record, write
from sgiou import SceneGraph, load_laion_sg, sg_iou
from table import table

EXACT = ("sg_iou", "entity_iou", "relation_iou")


@dataclass
class Row:
    """One system's results: a value per prompt and column (NaN where it has none)."""

    name: str
    values: dict[str, list[float]]
    builds_on: str | None
    evaluations: float  # flow-model evaluations a prompt
    tokens: float  # tokens through the flow model a prompt
    seconds: float  # wall time a prompt, measuring left out


class FlowMeter:
    """Counts what passes through the flow models: evaluations, tokens, and the seconds."""

    def __init__(self, loop):
        self.evaluations = 0
        self.tokens = 0
        self.began = time.perf_counter()
        pipelines = (loop.diffuser.pipeline, loop.editor.pipeline)
        self.models = {getattr(p, "transformer", None) or p.unet for p in pipelines}

    def __enter__(self):
        self.hooks = [
            model.register_forward_pre_hook(self.count, with_kwargs=True) for model in self.models
        ]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()
        self.seconds = time.perf_counter() - self.began

    def count(self, _, arguments, keywords):
        hidden = arguments[0] if arguments else keywords.get("hidden_states", keywords.get("x"))
        text = keywords.get("encoder_hidden_states")
        self.evaluations += len(hidden)
        for row in hidden:  # packed latents are (tokens, C), others (C, ..., H, W)
            self.tokens += len(row) if row.ndim == 2 else row[0].numel()
        self.tokens += len(hidden) * (text.shape[1] if text is not None else 0)


def measure(loop, graphs, images, exact):
    """Column -> a value per picture, by the VLM and, if `exact`, the pixel parser."""
    values = {}
    if exact:
        from tiny.world import exact_graph, parse

        seen = [
            SceneGraph(*exact_graph(things, graph)) for things, graph in zip(parse(images), graphs)
        ]
        scores = [sg_iou(pred, gold) for pred, gold in zip(seen, graphs)]
        values |= {name: [score[name] for score in scores] for name in EXACT}
    extracted = loop.checker.extract(images, graphs)
    scores = [sg_iou(pred, gold) for pred, gold in zip(extracted, graphs)]
    values |= {f"vlm_{name}": [score[name] for score in scores] for name in EXACT}
    values["judge"] = loop.checker.judge(images, [graph.prompt() for graph in graphs])
    return values


def kept_share(trajectory):
    """Of the things that instructions did not name, the share still in place after the edit.

    NaN where nothing was edited. By the pixel parser: embedded world only.
    """
    from tiny.world import kept, parse

    pictures = parse([step.image for step in trajectory.steps])
    pairs = [
        kept(pictures[trajectory.source(number)], pictures[number], step.instruction)
        for number, step in enumerate(trajectory.steps[:-1], 1)
        if step.instruction not in (None, "none")
    ]
    total = sum(whole for _, whole in pairs)
    return sum(part for part, _ in pairs) / total if total else math.nan


def row(name, loop, trajectories, meters, exact, builds_on=None):
    """Measures the best picture of every trajectory."""
    graphs = [trajectory.graph for trajectory in trajectories]
    values = measure(loop, graphs, [t.best.image for t in trajectories], exact)
    values["checker"] = [t.best.reflection.score for t in trajectories]
    if exact:
        values["kept"] = [kept_share(t) for t in trajectories]
    values["edits"] = [
        sum(step.instruction not in (None, "none") for step in t.steps[:-1]) for t in trajectories
    ]
    return Row(
        name=name,
        values=values,
        builds_on=builds_on,
        evaluations=sum(meter.evaluations for meter in meters) / len(graphs),
        tokens=sum(meter.tokens for meter in meters) / len(graphs),
        seconds=sum(meter.seconds for meter in meters) / len(graphs),
    )


def best_of(loop, trajectories, n):
    """Up to n - 1 further pictures of the Diffuser for each prompt, until the best one satisfies.

    The pictures stand as steps of a trajectory, so that the best one is chosen as the loop's is.
    """
    trajectories = first_pictures(trajectories)
    for number in range(1, n):
        active = [t for t in trajectories if not t.best.reflection.satisfied]
        if not active:
            break
        seeds = [t.seed + 1_000_003 * number for t in active]
        for trajectory, more in zip(active, loop.start([t.graph for t in active], seeds)):
            trajectory.steps.append(more.steps[0])
    return trajectories


def evaluate(loop, graphs, seed, exact, progress):
    """(rows, trajectories of the last). Args: progress: called with a row's name before it runs."""
    seeds = [seed + number for number in range(len(graphs))]
    progress("Diffuser")
    with FlowMeter(loop) as generation:
        first = loop.start(graphs, seeds)
    loops = []
    for name, actor_on, editor_on in systems(loop):
        loop.actor.use_adapter = actor_on
        loop.editor.use_adapter = editor_on
        trajectories = first_pictures(first)
        progress(f"1 round{name}")
        with FlowMeter(loop) as one:
            loop.advance(trajectories)
        base = loops[-2].name if loops else "Diffuser"
        loops.append(row(f"1 round{name}", loop, trajectories, [generation, one], exact, base))
        progress(f"loop{name}")
        with FlowMeter(loop) as more:
            for _ in range(loop.rounds - 1):
                loop.advance(trajectories)
        base = loops[-2].name if len(loops) > 1 else "1 round"
        loops.append(row(f"loop{name}", loop, trajectories, [generation, one, more], exact, base))

    # The loop's dearest trajectory, one generation and `rounds` edits, in tokens.
    picture = generation.tokens / len(graphs)
    edits = sum(sum(result.values["edits"]) for result in loops) / len(graphs)
    edit = sum(result.tokens - picture for result in loops) / max(edits, 1e-9)
    n = math.ceil((picture + loop.rounds * edit) / picture)
    progress(f"best of {n}")
    with FlowMeter(loop) as again:
        sampled = best_of(loop, first, n)
    alone = row("Diffuser", loop, first, [generation], exact)
    best = row(f"best of {n}", loop, sampled, [generation, again], exact, "Diffuser")
    return [alone, best, *loops], trajectories


def systems(loop):
    """(suffix of a row's name, whether the Actor's, whether the Editor's adapter is on)."""
    found = [("", False, False)]
    if loop.actor.has_adapter:
        found.append((" + phase 1", True, False))
    if loop.editor.has_adapter:
        found.append((" + phase 1 + 2" if loop.actor.has_adapter else " + phase 2", True, True))
    return found


def first_pictures(trajectories):
    """Trajectories of the first picture alone, sharing no step with the given ones."""
    return [
        Trajectory(t.graph, t.seed, [Step(t.steps[0].image, t.steps[0].reflection)])
        for t in trajectories
    ]


def run(arguments):
    """Evaluates, writes, and returns what is to be printed."""
    from tqdm import tqdm

    config = load_config(arguments.config, LoopConfig, arguments.overrides)
    settings = config.evaluation
    if config.rounds < 1:
        raise ValueError(f"{arguments.config}: key 'rounds' is 0; make it 1 or more to evaluate")
    if settings is None:
        raise ValueError(f"{arguments.config}: key 'evaluation' is missing; add it")
    graphs = load_laion_sg(settings.data, None if arguments.full else settings.limit)
    loop = build(config)
    graphs = loop.diffuser.readable(graphs, settings.data)
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=2 + 2 * len(systems(loop)), desc="evaluating", unit="row") as bar:

        def progress(name):
            bar.set_postfix_str(name)
            bar.update()

        rows, trajectories = evaluate(loop, graphs, settings.seed, settings.exact, progress)
    text = table(rows)
    write(folder / "table.md", text + "\n")
    results = json.dumps([vars(result) for result in rows])
    write(folder / "results.json", results.replace("NaN", "null") + "\n")
    text = f"{len(graphs)} prompts of {settings.data}\n\n{text}\n\n{folder / 'table.md'}\n"
    unread = f"\n{loop.editor.misread} instructions were not read in full"
    return f"{text}{record(folder, trajectories)}" + unread * bool(loop.editor.misread)


def main():
    parser = argparse.ArgumentParser(description="Evaluates the loop on held-out prompts.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the YAML's values")
    parser.add_argument("--config", default="eval.yaml")
    parser.add_argument("--full", action="store_true", help="all prompts of the file")
    parser.add_argument("--out", default="runs/eval", help="folder for table.md and results.json")
    arguments = parser.parse_args()
    try:
        print(run(arguments))
    except (ValueError, OSError, RuntimeError, KeyboardInterrupt) as error:
        sys.exit(" ".join(f"eval.py: {str(error) or 'stopped'}".split()))


if __name__ == "__main__":
    main()
