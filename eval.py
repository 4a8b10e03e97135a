"""Evaluation: every row of the table on the same held-out prompts with the same seeds.

    Diffuser                one image per prompt
    best of N               up to N images, the Checker's choice, at the compute of the full loop
    1 round, loop           Generate-Reflect-Edit with one edit or all of them, untrained
    ... + phase 1, + 2      the same with the Actor's adapter, and with the Editor's as well

Columns: SG-IoU, Entity-IoU and Relation-IoU after LAION-SG (arXiv 2412.08580), measured by the exact
parser (embedded world only) and by a VLM that writes down the scene graph it sees; that VLM's grade
of the image; the share of things that stay in place although an instruction does not name them;
edits, flow-model evaluations, flow-model tokens (text and context image included) and seconds per
prompt. Intervals are 95% bootstrap intervals over prompts, paired between rows.

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

from checker import Checker
from config import LoopConfig, load_config
from loop import Loop, Trajectory, build, device_and_dtype
from report import record, write
from sgiou import SceneGraph, load_laion_sg, parse_scene_graph, sg_iou

IOUS = ("sg_iou", "entity_iou", "relation_iou")
HEADINGS = {
    "sg_iou": "SG-IoU",
    "entity_iou": "Entity-IoU",
    "relation_iou": "Relation-IoU",
    "vlm_sg_iou": "SG-IoU (VLM)",
    "vlm_entity_iou": "Entity-IoU (VLM)",
    "vlm_relation_iou": "Relation-IoU (VLM)",
    "judge": "Judge",
    "checker": "Checker",
    "kept": "Kept",
    "edits": "Edits",
}
EXTRACT = (
    'You list what a picture shows as JSON: {"objects":[...],"triples":[["subject","relation",'
    '"object"],...]}. Use only the objects, pairs and relations named; leave out what is not there.'
)
JUDGE = "You grade pictures. Answer with one digit from 0 (nothing fits) to 9 (everything fits)."


@dataclass
class Row:
    """The results of one system: one value per prompt and column, NaN where there is none."""

    name: str
    values: dict[str, list[float]]
    builds_on: str | None  # name of the row that it adds something to
    evaluations: float  # flow-model evaluations per prompt
    tokens: float  # flow-model tokens per prompt
    seconds: float  # wall time per prompt, without measuring


def evaluate(loop, graphs, settings, judge, relations, progress):
    """Run and measure all systems: (rows, trajectories of the last one).

    Args: settings: an `EvaluationConfig`; judge: a `Checker` whose VLM measures, not necessarily
    the loop's; relations: words that it may use; progress: called with the name of a row before it runs.
    """
    seeds = [settings.seed + number for number in range(len(graphs))]
    progress("Diffuser")
    with FlowMeter(loop) as generation:
        first = loop.start(graphs, seeds)

    def row(name, trajectories, meters, builds_on=None):
        return measure(name, trajectories, meters, builds_on, judge, relations, settings.exact)

    rows = []
    for suffix, system in systems(loop):
        trajectories = first_images(first)
        progress(f"1 round{suffix}")
        with FlowMeter(loop) as one:
            system.advance(trajectories)
        base = rows[-2].name if rows else "Diffuser"
        rows.append(row(f"1 round{suffix}", trajectories, [generation, one], base))
        progress(f"loop{suffix}")
        with FlowMeter(loop) as more:
            for _ in range(loop.rounds - 1):
                system.advance(trajectories)
        base = rows[-2].name if len(rows) > 1 else "1 round"
        rows.append(row(f"loop{suffix}", trajectories, [generation, one, more], base))

    # N: as many images as the most expensive trajectory, one image and `rounds` edits, has tokens.
    image = generation.tokens / len(graphs)
    edits = sum(sum(result.values["edits"]) for result in rows) / len(graphs)
    edit = sum(result.tokens - image for result in rows) / max(edits, 1e-9)
    n = math.ceil((image + loop.rounds * edit) / image)
    progress(f"best of {n}")
    with FlowMeter(loop) as again:
        sampled = best_of(loop, first, n)
    alone = row("Diffuser", first, [generation])
    best = row(f"best of {n}", sampled, [generation, again], "Diffuser")
    return [alone, best, *rows], trajectories


def systems(loop):
    """(suffix of the row's name, `Loop`) for the untrained loop and for each trained adapter."""
    actor, editor = loop.actor, loop.editor
    parts = [("", actor.without_adapter(), editor.without_adapter())]
    if actor.has_adapter:
        parts.append((" + phase 1", actor, editor.without_adapter()))
    if editor.has_adapter:
        parts.append((" + phase 1 + 2" if actor.has_adapter else " + phase 2", actor, editor))
    return [
        (suffix, Loop(loop.diffuser, loop.checker, actor, editor, loop.rounds))
        for suffix, actor, editor in parts
    ]


def first_images(trajectories):
    """New trajectories that hold only the first step of the given ones."""
    return [Trajectory(t.graph, t.seed, t.steps[:1]) for t in trajectories]


def best_of(loop, trajectories, n):
    """Up to n - 1 more images per prompt, until the best one satisfies the Checker.

    They are steps of a trajectory, so that the best one is chosen as in the loop.
    """
    trajectories = first_images(trajectories)
    for number in range(1, n):
        active = [t for t in trajectories if not t.best.reflection.satisfied]
        if not active:
            break
        seeds = [t.seed + 1_000_003 * number for t in active]
        for trajectory, more in zip(active, loop.start([t.graph for t in active], seeds)):
            trajectory.steps += more.steps
    return trajectories


class FlowMeter:
    """Inside a `with` block, counts evaluations and tokens of the flow models, and seconds."""

    def __init__(self, loop):
        self.evaluations = self.tokens = 0
        pipelines = (loop.diffuser.pipeline, loop.editor.pipeline)
        self.models = {getattr(p, "transformer", None) or p.unet for p in pipelines}

    def __enter__(self):
        self.hooks = [m.register_forward_pre_hook(self.count, with_kwargs=True) for m in self.models]
        self.began = time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self.began
        for hook in self.hooks:
            hook.remove()

    def count(self, _, arguments, keywords):
        hidden = arguments[0] if arguments else keywords.get("hidden_states", keywords.get("x"))
        text = keywords.get("encoder_hidden_states")
        self.evaluations += len(hidden)
        for row in hidden:  # packed latents are (tokens, C), others (C, ..., H, W)
            self.tokens += len(row) if row.ndim == 2 else row[0].numel()
        self.tokens += len(hidden) * (text.shape[1] if text is not None else 0)


def measure(name, trajectories, meters, builds_on, judge, relations, exact):
    """The `Row` of one system, measured on the best image of every trajectory."""
    graphs = [t.graph for t in trajectories]
    images = [t.best.image for t in trajectories]
    values = {}
    if exact:
        from tiny.world import exact_graph, parse

        seen = [SceneGraph(*exact_graph(found, g)) for found, g in zip(parse(images), graphs)]
        scores = [sg_iou(pred, gold) for pred, gold in zip(seen, graphs)]
        values |= {name: [score[name] for score in scores] for name in IOUS}
        values["kept"] = [kept_share(t) for t in trajectories]
    scores = [sg_iou(p, g) for p, g in zip(extract(judge, images, graphs, relations), graphs)]
    values |= {f"vlm_{name}": [score[name] for score in scores] for name in IOUS}
    values["judge"] = grade(judge, images, [graph.prompt() for graph in graphs])
    values["checker"] = [t.best.reflection.score for t in trajectories]
    values["edits"] = [sum(step.edited for step in t.steps[1:]) for t in trajectories]
    costs = ("evaluations", "tokens", "seconds")
    totals = {cost: sum(getattr(meter, cost) for meter in meters) / len(graphs) for cost in costs}
    return Row(name, values, builds_on, **totals)


def kept_share(trajectory):
    """Of the things that instructions did not name, the share still in place after the edits.

    By the exact parser, so for the embedded world only. NaN if nothing was edited.
    """
    from tiny.world import kept, parse

    found = parse([step.image for step in trajectory.steps])
    pairs = [
        kept(found[step.source], things, step.instruction)
        for step, things in zip(trajectory.steps, found)
        if step.source is not None and step.edited
    ]
    total = sum(whole for _, whole in pairs)
    return sum(part for part, _ in pairs) / total if total else math.nan


def extract_request(graph, relations):
    """The user message of `extract`: the objects, which pairs to relate, and the relation words."""
    pairs = ", ".join(f"{subject} - {object}" for subject, _, object in graph.triples)
    return (
        f"Objects: {', '.join(graph.objects)}. Pairs: {pairs}. Relations: {', '.join(relations)}."
    )


def extract(vlm, images, graphs, relations=None, max_new_tokens=256):
    """The scene graph that a VLM (a `Checker`) writes down for each image, as LAION-SG measures.

    relations: the words it may use; None takes those of each graph.
    """
    import torch

    allowed = [relations or list({r: 0 for _, r, _ in graph.triples}) for graph in graphs]
    texts = [extract_request(*asked) for asked in zip(graphs, allowed)]
    answers = []
    for start in range(0, len(texts), vlm.batch_size):
        part = slice(start, start + vlm.batch_size)
        inputs = vlm.inputs(EXTRACT, images[part], texts[part])
        with torch.no_grad():
            ids = vlm.model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, repetition_penalty=1.0
            )
        completions = ids[:, inputs["input_ids"].shape[1] :]
        answers += vlm.processor.batch_decode(completions, skip_special_tokens=True)
    return [
        parse_scene_graph(answer, graph.objects, words)
        for answer, graph, words in zip(answers, graphs, allowed)
    ]


def judge_request(prompt):
    """The user message of `grade`."""
    return f"How well does the picture fit: {prompt}?"


def grade(vlm, images, prompts):
    """How well each image fits its prompt, in [0, 1]: the expected digit over nine."""
    import torch

    texts = [judge_request(prompt) for prompt in prompts]
    log_probs = vlm.answers(JUDGE, images, texts, vlm.token_ids(*"0123456789"))  # (B, 10)
    return (log_probs.softmax(-1) @ torch.arange(10.0) / 9).tolist()


def bootstrap(values, others=None, resamples=2000):
    """(mean, low, high): the mean and its 95% percentile-bootstrap interval.

    With `others`, of the paired differences. Prompts without a value in either are left out.
    """
    import numpy as np

    values = np.array(values) - (np.array(others) if others is not None else 0)
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return math.nan, math.nan, math.nan
    draws = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[draws].mean(1), (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def tables(rows):
    """Two tables of strings, headings first: the means, and the main column with intervals."""
    columns = [name for name in HEADINGS if name in rows[0].values]
    costs = ["flow evals", "flow tokens", "s/prompt"]
    means = [["", *(HEADINGS[name] for name in columns), *costs]]
    for row in rows:
        values = [bootstrap(row.values[name])[0] for name in columns]
        cells = ["–" if math.isnan(value) else f"{value:.3f}" for value in values]
        cells += [f"{row.evaluations:.1f}", f"{row.tokens:,.0f}", f"{row.seconds:.2f}"]
        means.append([row.name, *cells])
    main = "sg_iou" if "sg_iou" in columns else "vlm_sg_iou"
    by_name = {row.name: row for row in rows}
    baselines = [rows[0], *(row for row in rows if row.name.startswith("best of"))]
    against = [f"against {row.name}" for row in baselines]
    gains = [["", "mean", *against, "against the row it builds on"]]
    for row in rows:
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*bootstrap(row.values[main]))]
        for other in (*baselines, by_name.get(row.builds_on)):
            if other is None or other is row:
                cells.append("–")
            else:
                difference = bootstrap(row.values[main], other.values[main])
                cells.append("{:+.3f} [{:+.3f}, {:+.3f}]".format(*difference))
        gains.append([row.name, *cells])
    title = f"{HEADINGS[main]}, with 95% intervals of the paired bootstrap"
    return [{"title": "", "cells": means}, {"title": title, "cells": gains}]


def markdown(tables):
    texts = []
    for table in tables:
        lines = ["| " + " | ".join(row) + " |" for row in table["cells"]]
        lines.insert(1, "|---" * len(table["cells"][0]) + "|")
        texts.append((f"{table['title']}:\n\n" if table["title"] else "") + "\n".join(lines))
    return "\n\n".join(texts)


def run(arguments):
    """Evaluate, write the results, and return what is to be printed."""
    from tqdm import tqdm

    config = load_config(arguments.config, LoopConfig, arguments.overrides)
    settings = config.evaluation
    if settings is None:
        raise ValueError(f"{arguments.config}: key 'evaluation' is missing; add it")
    if config.rounds < 1:
        raise ValueError(f"{arguments.config}: key 'rounds' is 0; make it 1 or more to evaluate")
    graphs = load_laion_sg(settings.data, None if arguments.full else settings.limit)
    loop = build(config)
    judge = loop.checker
    if settings.judge:
        part = settings.judge
        weights = (part.model, *device_and_dtype(part), part.attention)
        judge = Checker.load(*weights, batch_size=part.batch_size)
        judge.probe()
    graphs = loop.diffuser.readable(graphs, settings.data)
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=2 + 2 * len(systems(loop)), desc="evaluating", unit="row") as bar:

        def progress(name):
            bar.set_postfix_str(name)
            bar.update()

        rows, trajectories = evaluate(loop, graphs, settings, judge, config.relations, progress)
    results = {"tables": tables(rows), "rows": [vars(row) for row in rows]}
    text = markdown(results["tables"])
    write(folder / "table.md", text + "\n")
    write(folder / "results.json", json.dumps(results).replace("NaN", "null") + "\n")
    page = record(folder, trajectories)
    return f"{len(graphs)} prompts of {settings.data}\n\n{text}\n\n{folder / 'table.md'}\n{page}"


def main():
    parser = argparse.ArgumentParser(description="Evaluates the loop on held-out prompts.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a YAML value")
    parser.add_argument("--config", default="eval.yaml")
    parser.add_argument("--full", action="store_true", help="all prompts of the file")
    parser.add_argument("--out", default="runs/eval", help="folder for table.md and results.json")
    arguments = parser.parse_intermixed_args()
    try:
        print(run(arguments))
    except (ValueError, OSError, RuntimeError, KeyboardInterrupt) as error:
        sys.exit(" ".join(f"eval.py: {str(error) or 'stopped'}".split()))


if __name__ == "__main__":
    main()
