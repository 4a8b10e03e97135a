"""Evaluation: every row of the table on the same held-out prompts with the same first images.

    Diffuser            one image per prompt
    loop                Generate-Reflect-Edit, untrained
    ... + phase 1, + 2  the same with the Actor's adapter, and with the Editor's as well
    best of N           the Checker's choice of N images, at the compute of the costliest loop

SG-IoU, Entity-IoU, and Relation-IoU are those of LAION-SG (arXiv 2412.08580), by the exact parser
(embedded world only) and by a VLM that writes down the scene graph it sees. "Judge" is that VLM's
grade of the image. "Kept" is the share of unnamed things that are still in place after the edits,
"Debris" the share of painted pixels that belong to no object. Costs are per prompt: flow tokens
include texts and context images, VLM tokens are those read and written by Checker and Actor.

    python eval.py                # the first 300 test prompts of eval.yaml
    python eval.py --full         # all of them
    python eval.py --resume       # keep the rows that an interrupted evaluation finished
"""

import argparse
import copy
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, replace

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see train.py
if __name__ == "__main__":  # Ctrl-C before the first row: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from checker import Checker
from config import LoopConfig, fingerprint, load_config
from loop import Trajectory, build, device_and_dtype, naming, output_folder
from report import record, report, say, write
from sgiou import SceneGraph, load_graphs, parse_scene_graph, sg_iou

IOUS = {"sg_iou": "SG-IoU", "entity_iou": "Entity-IoU", "relation_iou": "Relation-IoU"}
HEADINGS = IOUS | {f"vlm_{name}": f"{heading} (VLM)" for name, heading in IOUS.items()}
HEADINGS |= {name: name.capitalize() for name in ("judge", "checker", "kept", "debris", "edits")}
EXTRACT = (
    'You list what an image shows as JSON: {"objects":[...],"triples":[["subject","relation",'
    '"object"],...]}. Use only the objects, pairs and relations named; leave out what is not there.'
)
JUDGE = "You grade images. Answer with one digit from 0 (nothing fits) to 9 (everything fits)."


@dataclass
class Row:
    """The results of one system."""

    name: str
    values: dict[str, list]  # column -> one value per prompt; NaN or None where there is none
    flow_tokens: float  # per prompt, as are the others
    vlm_tokens: float
    seconds: float  # wall time, without measuring


def evaluate(loop, graphs, settings, relations, judge, rows, save):
    """Run and measure all systems, except those that `rows` already holds.

    Args: settings: an `EvaluationConfig`; relations: words that the judge may use; judge: the
    `Checker` whose VLM measures; rows: a list that grows by a `Row` for every system; save: called
    after each with its trajectories.
    """

    def add(name, trajectories, meter):
        values = measure(trajectories, judge, relations, settings.exact)
        costs = (meter.flow_tokens, meter.vlm_tokens, meter.seconds)
        rows.append(Row(name, values, *(cost / len(graphs) for cost in costs)))
        save(trajectories)

    done = [row.name for row in rows]
    with Meter(loop) as generation:
        first = loop.start(graphs, [settings.seed + number for number in range(len(graphs))])
    if "Diffuser" not in done:
        add("Diffuser", first, generation)
    for name, system in systems(loop, settings.untrained_temperature):
        if name in done:
            continue
        trajectories = first_images(first)
        meter = copy.copy(generation)  # the first images are part of the cost
        with meter:
            for _ in range(loop.rounds):
                system.advance(trajectories)
        add(name, trajectories, meter)
    if not any(name.startswith("best of") for name in done):
        trajectories, meter = first_images(first), copy.copy(generation)
        n = best_of_n(loop, trajectories, meter, max(row.flow_tokens for row in rows))
        add(f"best of {n}", trajectories, meter)


def systems(loop, untrained_temperature=None):
    """(name of the row, `Loop`) for the untrained loop and for each trained adapter.

    untrained_temperature: of the Actor without its adapter, if not that of the trained one.
    """
    untrained, editor = loop.actor.without_adapter(), loop.editor.without_adapter()
    untrained.temperature = untrained_temperature or untrained.temperature
    parts = {"loop": (untrained, editor)}
    trained = loop.actor.has_adapter
    if trained:
        parts["loop + phase 1"] = loop.actor, editor
    if loop.editor.has_adapter:
        name = "loop + phase 1 + 2" if trained else "loop + phase 2"
        parts[name] = (loop.actor if trained else untrained), loop.editor
    return [(name, replace(loop, actor=a, editor=e)) for name, (a, e) in parts.items()]


def first_images(trajectories):
    """New trajectories that hold only the first step of the given ones."""
    return [Trajectory(t.graph, t.seed, t.steps[:1]) for t in trajectories]


def best_of_n(loop, trajectories, meter, flow_tokens):
    """Add images to trajectories of one image until these cost `flow_tokens` per prompt. -> N.

    A prompt whose best image satisfies the Checker needs no more, just as in the loop.
    """
    n = 1
    while meter.flow_tokens < flow_tokens * len(trajectories):
        active = [t for t in trajectories if not t.best.reflection.satisfied]
        if not active:
            break
        with meter:
            seeds = [t.seed + 1_000_003 * n for t in active]
            more = loop.start([t.graph for t in active], seeds)
        for trajectory, made in zip(active, more):
            trajectory.steps += made.steps
        n += 1
    return n


class Meter:
    """Inside `with` blocks, counts seconds and the tokens that pass through the models."""

    def __init__(self, loop):
        pipelines = (loop.diffuser.pipeline, loop.editor.pipeline)
        self.flow_models = {getattr(p, "transformer", None) or p.unet for p in pipelines}
        self.vlms = {loop.checker.model, loop.actor.model}
        self.flow_tokens = self.vlm_tokens = self.seconds = 0

    def __enter__(self):
        counters = [(model, self.count_flow) for model in self.flow_models]
        counters += [(model, self.count_vlm) for model in self.vlms]
        self.hooks = [m.register_forward_pre_hook(f, with_kwargs=True) for m, f in counters]
        self.seconds -= time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds += time.perf_counter()
        for hook in self.hooks:
            hook.remove()

    def count_flow(self, _, arguments, keywords):
        hidden = arguments[0] if arguments else keywords.get("hidden_states", keywords.get("x"))
        text = keywords.get("encoder_hidden_states")
        for row in hidden:  # packed latents are (tokens, C), others (C, ..., H, W)
            self.flow_tokens += len(row) if row.ndim == 2 else row[0].numel()
        self.flow_tokens += len(hidden) * (text.shape[1] if text is not None else 0)

    def count_vlm(self, _, arguments, keywords):
        self.vlm_tokens += keywords["input_ids"].numel()  # padding is computed, so it counts


def measure(trajectories, judge, relations, exact):
    """{column: one value per prompt}, measured on the best image of every trajectory."""
    graphs = [t.graph for t in trajectories]
    images = [t.best.image for t in trajectories]
    seen = extract(judge, images, graphs, relations)
    values = {f"vlm_{name}": column for name, column in overlaps(seen, graphs).items()}
    values["judge"] = grade(judge, images, [graph.prompt() for graph in graphs])
    values["checker"] = [t.best.reflection.score for t in trajectories]
    values["edits"] = [float(sum(step.edited for step in t.steps[1:])) for t in trajectories]
    if exact:
        from tiny.world import debris, exact_graphs, kept_share

        values |= overlaps(exact_graphs(images, graphs), graphs)
        values["kept"] = [kept_share(t) for t in trajectories]
        values["debris"] = [debris(image) for image in images]
    return values


def overlaps(seen, graphs):
    """{column: one IoU per prompt}. Without relations in a prompt there are none of relations."""
    columns = {name: [] for name in IOUS}
    for pred, gold in zip(seen, graphs, strict=True):
        scores = sg_iou(pred, gold)
        for name, column in columns.items():
            column.append(scores[name] if gold.triples or name == "entity_iou" else None)
    return columns


def extract_request(graph, relations):
    """The user message of `extract`: the objects, which pairs to relate, and the relation words."""
    objects, words = ", ".join(graph.objects), ", ".join(relations)
    pairs = ", ".join(f"{subject} - {object}" for subject, _, object in graph.triples)
    return f"Objects: {objects}. Pairs: {pairs}. Relations: {words}."


def extract(vlm, images, graphs, relations=()):
    """The scene graph that a VLM (a `Checker`) writes down for each image, as LAION-SG measures.

    relations: words that it may use besides those of each graph. Says how many answers could not be
    read; they count as empty graphs.
    """
    import torch

    words = [graph.vocabulary(relations) for graph in graphs]
    texts = [extract_request(*asked) for asked in zip(graphs, words)]
    settings = {"max_new_tokens": 256, "do_sample": False, "repetition_penalty": 1.0}
    answers = []
    for start in range(0, len(texts), vlm.batch_size):
        part = slice(start, start + vlm.batch_size)
        inputs = vlm.inputs(EXTRACT, images[part], texts[part])
        with torch.no_grad():
            ids = vlm.model.generate(**inputs, **settings)
        completions = ids[:, inputs["input_ids"].shape[1] :]
        answers += vlm.processor.batch_decode(completions, skip_special_tokens=True)
    objects = [graph.objects for graph in graphs]
    seen = [parse_scene_graph(*read) for read in zip(answers, objects, words)]
    if None in seen:
        say(f"  {seen.count(None)} of {len(seen)} answers of the judge hold no scene graph")
    return [graph or SceneGraph((), ()) for graph in seen]


def judge_request(prompt):
    """The user message of `grade`."""
    return f"How well does the image fit: {prompt}?"


def grade(vlm, images, prompts):
    """How well each image fits its prompt, in [0, 1]: the expected digit over nine."""
    import torch

    texts = [judge_request(prompt) for prompt in prompts]
    log_probs = vlm.answers(JUDGE, images, texts, vlm.token_ids(*"0123456789"))  # (B, 10)
    return (log_probs.softmax(-1) @ torch.arange(10.0) / 9).tolist()


def bootstrap(values, others=None, resamples=2000):
    """(mean, low, high): the mean and its 95% percentile-bootstrap interval.

    With `others`, of the paired differences. Prompts that lack a value are left out.
    """
    import numpy as np

    values = np.array(values, float)  # None becomes NaN
    if others is not None:
        values = values - np.array(others, float)
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return math.nan, math.nan, math.nan
    draws = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[draws].mean(1), (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def tables(rows, counts):
    """Three tables, each as {"title": str, "cells": rows of strings, headings first}.

    The means; the main column with intervals; the main column by number of relations.
    Args: counts: number of relations of each prompt.
    """
    rows = sorted(rows, key=lambda row: row.name.startswith("loop"))  # stable: loops last
    diffuser, last = rows[0], rows[-1]
    best_of = next((row for row in rows if row.name.startswith("best of")), None)
    columns = [name for name in HEADINGS if name in diffuser.values]
    main = "sg_iou" if "sg_iou" in columns else "vlm_sg_iou"

    costs = ["Flow tokens", "VLM tokens", "Seconds"]
    means = [["", *(HEADINGS[name] for name in columns), *costs]]
    for row in rows:
        values = [bootstrap(row.values[name])[0] for name in columns]
        cells = ["–" if math.isnan(value) else f"{value:.3f}" for value in values]
        cells += [f"{row.flow_tokens:,.0f}", f"{row.vlm_tokens:,.0f}", f"{row.seconds:.2f}"]
        means.append([row.name, *cells])

    def gain(row, other, chosen=None):
        """The paired difference of two rows with its interval, as text."""
        if other is None or other is row:
            return "–"
        pairs = [each.values[main] for each in (row, other)]
        pairs = [[v for v, n in zip(p, counts) if chosen is None or n == chosen] for p in pairs]
        return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*bootstrap(*pairs))

    others = ["against the Diffuser", "against best of N", "against the row it adds to"]
    gains = [["", "mean", *others]]
    before = None  # what the next loop adds an adapter to
    for row in rows:
        mean = "{:.3f} [{:.3f}, {:.3f}]".format(*bootstrap(row.values[main]))
        gains.append([row.name, mean, *(gain(row, o) for o in (diffuser, best_of, before))])
        if row is not best_of:
            before = row

    kinds = sorted(set(counts))
    complexity = [["", *(f"{n} ({counts.count(n)} prompts)" for n in kinds)]]
    for row in rows:
        parts = [[v for v, n in zip(row.values[main], counts) if n == kind] for kind in kinds]
        complexity.append([row.name, *(f"{bootstrap(part)[0]:.3f}" for part in parts)])
    if best_of and last is not best_of:
        against = [gain(last, best_of, kind) for kind in kinds]
        complexity.append([f"{last.name} against {best_of.name}", *against])
    heading = HEADINGS[main]
    return [
        {"title": "", "cells": means},
        {"title": f"{heading}, with 95% intervals of the paired bootstrap", "cells": gains},
        {"title": f"{heading} by number of relations in the prompt", "cells": complexity},
    ]


def markdown(tables):
    text = ""
    for table in tables:
        text += f"{table['title']}:\n\n" if table["title"] else ""
        headings, *rows = ["| " + " | ".join(row) + " |\n" for row in table["cells"]]
        text += headings + "|---" * len(table["cells"][0]) + "|\n" + "".join(rows) + "\n"
    return text


def run(arguments):
    """Evaluate, saving every finished row, and return what is to be printed."""
    config = load_config(arguments.config, LoopConfig, arguments.overrides)
    settings = config.evaluation
    if not settings or not config.rounds:
        raise ValueError(f"{arguments.config}: set the keys 'evaluation' and 'rounds' (1 or more)")
    limit = None if arguments.full else settings.limit
    graphs = load_graphs(settings.data, config.relations, limit)
    folder = output_folder(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    made_with = {"config": fingerprint(config), "prompts": len(graphs)}
    rows = finished_rows(folder / "results.json", made_with, arguments.resume)
    loop = build(config)
    judge, judge_name = loop.checker, "the Checker's own model"
    if settings.judge:
        part, judge_name = settings.judge, settings.judge.model
        with naming(config, "evaluation.judge.model"):
            weights = (part.model, *device_and_dtype(part), part.attention)
            judge = Checker.load(*weights, batch_size=part.batch_size)
            judge.probe()
    graphs = loop.diffuser.readable(graphs, settings.data)
    counts = [min(len(graph.triples), 6) for graph in graphs]  # 6: or more

    def save(trajectories):
        say(f"  {rows[-1].name}")
        results = {"tables": tables(rows, counts), "rows": [vars(row) for row in rows]} | made_with
        write(folder / "table.md", markdown(results["tables"]))
        write(folder / "results.json", json.dumps(results, allow_nan=False) + "\n")
        if rows[-1].name.startswith("best of"):  # the page keeps the trajectories of the loop
            report([folder])
        else:
            record(folder, trajectories)

    say(f"evaluating {len(graphs)} prompts of {settings.data}; finished rows:")
    evaluate(loop, graphs, settings, config.relations, judge, rows, save)
    judged = f"The columns VLM and Judge are by {judge_name}."
    text = markdown(tables(rows, counts))
    return f"\n{text}{judged}\n{folder / 'table.md'}\n{folder / 'report.html'}"


def finished_rows(path, made_with, resume):
    """The rows of an interrupted evaluation; none for a new one.

    Raises ValueError if there is another evaluation to resume, or an unfinished one in the way.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**row) for row in results["rows"]]
        same = all(results[key] == value for key, value in made_with.items())
    except (OSError, ValueError, KeyError, TypeError) as error:
        if not resume:
            return []
        raise ValueError(f"{path}: cannot be resumed ({error}); start without --resume") from None
    if not resume and not any(row.name.startswith("best of") for row in rows):
        raise ValueError(f"{path}: is unfinished; add --resume, or --out with another folder")
    if resume and not same:
        raise ValueError(f"{path}: is of another config; start without --resume, or set --out")
    return rows if resume else []


def main():
    parser = argparse.ArgumentParser(description="Evaluates the loop on held-out prompts.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a YAML value")
    parser.add_argument("--config", default="eval.yaml")
    parser.add_argument("--full", action="store_true", help="all prompts of the file")
    parser.add_argument("--resume", action="store_true", help="keep finished rows")
    parser.add_argument("--out", default="runs/eval", help="folder for table.md and results.json")
    arguments = parser.parse_intermixed_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        say(run(arguments))
    except (ValueError, OSError, RuntimeError, KeyboardInterrupt) as error:
        stopped = "stopped; --resume keeps the rows that are finished"
        sys.exit(" ".join(f"eval.py: {str(error) or stopped}".split()))


if __name__ == "__main__":
    main()
