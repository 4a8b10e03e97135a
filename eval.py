"""Evaluation: all systems on the same held-out prompts, with the same first images.

    Diffuser            one image per prompt
    loop                Generate-Reflect-Edit, untrained
    ... + phase 1, + 2  the same with the Actor's adapter, and with the Editor's as well
    best of N           the Checker's choice of N images, at the compute of the costliest loop

SG-IoU, Entity-IoU, and Relation-IoU are those of LAION-SG (arXiv 2412.08580), by the exact parser
(tiny world only) and by a VLM that writes down the scene graph it sees. "Judge" is that VLM's
grade of the image, "Kept" the share of unnamed things that are still in place after each edit,
"Debris" the share of painted pixels that belong to no object. Costs are per prompt. Flow tokens
include texts and context images.

    python eval.py                           # the first 300 test prompts of eval.yaml
    python eval.py --full --out runs/full    # all of them
    python eval.py --resume                  # keep the rows that an interrupted evaluation finished
"""

import argparse
import copy
import functools
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from statistics import fmean

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see train.py
if __name__ == "__main__":  # Ctrl-C ends it without a traceback; finished rows are on disk
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from tqdm import tqdm

from checker import Checker
from config import LoopConfig, differences, fingerprint, load_config
from loop import Trajectory, build, check_sums, device_and_dtype, naming, output_folder
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


# ---- running the systems ----


def evaluate(loop, graphs, settings, relations, judge, rows):
    """Run and measure one system after the other: add its `Row`, yield its trajectories.

    Args:
        settings: an `EvaluationConfig`.
        relations: words that the judge may use.
        judge: the `Checker` whose VLM measures.
        rows: of the systems that are finished already, in order.
    """
    with Meter(loop) as generation:
        first = loop.start(graphs, [settings.seed + number for number in range(len(graphs))])
    loops = systems(loop, settings.untrained_temperature)
    everything = [("Diffuser", replace(loop, rounds=0)), *loops, ("best of", loop)]
    for name, system in everything[len(rows) :]:
        trajectories = first_images(first)
        meter = copy.copy(generation)  # the first images are part of the cost
        if name == "best of":
            highest = max(row.flow_tokens for row in rows)
            n = best_of_n(loop, trajectories, meter, highest)  # adds images
            name = f"best of {n}"
        else:
            with meter:
                for _ in tqdm(range(system.rounds), name, leave=False, disable=None):
                    system.advance(trajectories)
        values = measure(trajectories, judge, relations, settings.exact)
        costs = (meter.flow_tokens, meter.vlm_tokens, meter.seconds)
        rows.append(Row(name, values, *(cost / len(graphs) for cost in costs)))
        yield trajectories


def systems(loop, untrained_temperature=None):
    """(name of the row, `Loop`) for the untrained loop and for each trained adapter.

    untrained_temperature: of the Actor without its adapter, if not that of the trained one.
    """
    actor, editor = loop.actor.without_adapter(), loop.editor.without_adapter()
    actor.temperature = untrained_temperature or actor.temperature
    found = [("loop", replace(loop, actor=actor, editor=editor))]
    if loop.actor.has_adapter:
        found.append(("loop + phase 1", replace(loop, editor=editor)))
    if loop.editor.has_adapter and loop.actor.has_adapter:
        found.append(("loop + phase 1 + 2", loop))
    elif loop.editor.has_adapter:
        found.append(("loop + phase 2", replace(loop, actor=actor)))
    return found


def first_images(trajectories):
    """New trajectories that hold only the first step of the given ones."""
    return [Trajectory(t.graph, t.seed, t.steps[:1]) for t in trajectories]


def best_of_n(loop, trajectories, meter, budget):
    """Add images to trajectories of one image until they cost `budget` flow tokens a prompt. -> N.

    A prompt whose best image satisfies the Checker needs no more, just as in the loop.
    """
    while meter.flow_tokens < budget * len(trajectories):
        active = [t for t in trajectories if not t.best.reflection.satisfied]
        if not active:
            break
        with meter:
            more = loop.start([t.graph for t in active], [t.step_seed for t in active])
        for trajectory, made in zip(active, more):
            trajectory.steps += made.steps
    return max(len(t.steps) for t in trajectories)


class Meter:
    """Inside `with` blocks, counts seconds and the tokens that pass through the models."""

    def __init__(self, loop):
        flows = [part.pipeline for part in (loop.diffuser, loop.editor)]
        flows = [getattr(flow, "transformer", None) or flow.unet for flow in flows]
        self.models = {*flows, loop.checker.model, loop.actor.model}  # parts may share one
        self.flow_tokens = self.vlm_tokens = self.seconds = 0

    def __enter__(self):
        self.hooks = [
            model.register_forward_pre_hook(self.count, with_kwargs=True) for model in self.models
        ]
        self.seconds -= time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds += time.perf_counter()
        for hook in self.hooks:
            hook.remove()

    def count(self, _, arguments, keywords):
        if "input_ids" in keywords:  # a VLM; padding is computed, so it counts
            self.vlm_tokens += keywords["input_ids"].numel()
            return
        latents = arguments[0] if arguments else keywords.get("hidden_states", keywords.get("x"))
        for row in latents:  # packed latents are (tokens, C), others (C, ..., H, W)
            self.flow_tokens += len(row) if row.ndim == 2 else row[0].numel()
        text = keywords.get("encoder_hidden_states")  # (B, tokens, C)
        if text is not None:
            self.flow_tokens += len(latents) * text.shape[1]


# ---- measuring the images ----


def measure(trajectories, judge, relations, exact):
    """{column: one value per prompt}, measured on the best image of every trajectory."""
    graphs = [t.graph for t in trajectories]
    images = [t.best.image for t in trajectories]
    seen = extract(judge, images, graphs, relations)
    values = {f"vlm_{name}": column for name, column in overlaps(seen, graphs).items()}
    values["judge"] = grade(judge, images, [graph.prompt() for graph in graphs])
    values["checker"] = [t.best.reflection.score for t in trajectories]
    values["edits"] = [float(sum(step.is_edit for step in t.steps[1:])) for t in trajectories]
    if exact:
        from tiny.world import debris, exact_graphs, kept_share

        values |= overlaps(exact_graphs(images, graphs), graphs)
        values["kept"] = [kept_share(t) for t in trajectories]
        values["debris"] = [debris(image) for image in images]
    return values


def overlaps(seen, graphs):
    """{column: one IoU per prompt}; None for relations where the prompt has none."""
    columns = {"sg_iou": [], "entity_iou": [], "relation_iou": []}
    for pred, gold in zip(seen, graphs, strict=True):
        scores = sg_iou(pred, gold)
        for name, column in columns.items():
            column.append(scores[name] if gold.triples or name == "entity_iou" else None)
    return columns


def extract(vlm, images, graphs, relations=()):
    """The scene graph that a VLM (a `Checker`) writes down for each image, as LAION-SG measures.

    relations: words that it may use besides those of each graph. An answer without a scene graph
    counts as an empty one; prints how many there are, and how many answers were cut off.
    """
    import torch

    words = [graph.vocabulary(relations) for graph in graphs]
    texts = [extract_request(graph, known) for graph, known in zip(graphs, words)]
    answers, cut_off = [], 0
    longest = max([256] + [40 * len(graph.triples) for graph in graphs])  # tokens
    for start in range(0, len(texts), vlm.batch_size):
        part = slice(start, start + vlm.batch_size)
        inputs = vlm.inputs(EXTRACT, images[part], texts[part])
        with torch.no_grad():
            ids = vlm.model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        completions = ids[:, inputs["input_ids"].shape[1] :]
        ended = torch.isin(completions, completions.new_tensor(vlm.end_ids)).any(1)
        cut_off += (~ended).sum().item()
        answers += vlm.processor.batch_decode(completions, skip_special_tokens=True)
    parsed = [
        parse_scene_graph(answer, graph.objects, known)
        for answer, graph, known in zip(answers, graphs, words)
    ]
    if None in parsed:
        say(f"  {parsed.count(None)} of {len(parsed)} answers of the judge hold no scene graph")
    if cut_off:
        say(f"  {cut_off} of {len(parsed)} answers of the judge are cut off after {longest} tokens")
    return [graph or SceneGraph((), ()) for graph in parsed]


def extract_request(graph, relations):
    """The user message of `extract`: the objects, which pairs to relate, and the relation words."""
    objects, words = ", ".join(graph.objects), ", ".join(relations)
    pairs = ", ".join(f"{subject} - {object}" for subject, _, object in graph.triples)
    return f"Objects: {objects}. Pairs: {pairs}. Relations: {words}."


def grade(vlm, images, prompts):
    """How well each image fits its prompt, in [0, 1]: the expected digit over nine."""
    import torch

    texts = [judge_request(prompt) for prompt in prompts]
    log_probs = vlm.answers(JUDGE, images, texts, vlm.token_ids(*"0123456789"))  # (B, 10)
    return (log_probs.softmax(-1) @ torch.arange(10.0) / 9).tolist()


def judge_request(prompt):
    """The user message of `grade`."""
    return f"How well does the image fit: {prompt}?"


# ---- the tables ----


def bootstrap(values, others=None):
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
    draws = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.quantile(values[draws].mean(1), (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def mean_text(values):
    """The mean as text, or a dash if no prompt has a value."""
    value = bootstrap(values)[0]
    return "–" if math.isnan(value) else f"{value:.3f}"


def interval_text(values, others=None):
    """What `bootstrap` returns as text, with signs if it is a difference."""
    sign = "" if others is None else "+"
    mean, low, high = bootstrap(values, others)
    if math.isnan(mean):
        return "–"
    return f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def tables(rows, counts, judge):
    """Three tables, each as {"title": str, "cells": rows of strings, headings first}.

    counts: the number of relations of each prompt. All from 6 on share a column. judge: its name.
    """
    six = "6 or more" if max(counts) > 6 else "6"
    counts = [six if count >= 6 else str(count) for count in counts]
    rows = sorted(rows, key=lambda row: row.name.startswith("loop"))  # stable: loops last
    last = rows[-1]
    best_of = next((row for row in rows if row.name.startswith("best of")), None)
    columns = [name for name in HEADINGS if name in last.values]
    main = columns[0]  # the exact SG-IoU, or that of the VLM
    title = HEADINGS[main]

    means = [["", *(HEADINGS[name] for name in columns), "Flow tokens", "VLM tokens", "Seconds"]]
    for row in rows:
        cells = [mean_text(row.values[name]) for name in columns]
        costs = [f"{row.flow_tokens:,.0f}", f"{row.vlm_tokens:,.0f}", f"{row.seconds:.2f}"]
        means.append([row.name, *cells, *costs])

    others = ["against the Diffuser", "against best of N", "against the row it adds to"]
    gains = [["", "mean", *others]]
    previous = None  # the row that the next one adds to
    for row in rows:
        cells = [interval_text(row.values[main])]
        for other in (rows[0], best_of, previous):
            missing = other is None or other is row
            cells.append("–" if missing else interval_text(row.values[main], other.values[main]))
        gains.append([row.name, *cells])
        if row is not best_of:
            previous = row

    def part(row, count):
        """The main column of the prompts with so many relations."""
        return [value for value, n in zip(row.values[main], counts) if n == count]

    kinds = sorted(set(counts))
    by_count = [["", *(f"{count} ({counts.count(count)} prompts)" for count in kinds)]]
    for row in rows:
        by_count.append([row.name, *(mean_text(part(row, count)) for count in kinds)])
    if best_of and last is not best_of:
        against = [interval_text(part(last, count), part(best_of, count)) for count in kinds]
        by_count.append([f"{last.name} against {best_of.name}", *against])

    return [
        {"title": f"Means; the columns (VLM) and Judge are by {judge}", "cells": means},
        {"title": f"{title}, with 95% intervals of the paired bootstrap", "cells": gains},
        {"title": f"{title} by number of relations in the prompt", "cells": by_count},
    ]


def markdown(tables):
    text = ""
    for table in tables:
        text += f"{table['title']}:\n\n"
        headings, *rows = ["| " + " | ".join(row) + " |\n" for row in table["cells"]]
        text += headings + "|---" * len(table["cells"][0]) + "|\n" + "".join(rows) + "\n"
    return text


# ---- the command line ----


def run(arguments):
    """Evaluate, save every row as soon as it is finished, and print the tables."""
    config = load_config(arguments.config, LoopConfig, arguments.overrides)
    settings = config.evaluation
    if not settings:
        raise ValueError(f"{arguments.config}: key 'evaluation' is missing; add it")
    limit = None if arguments.full else settings.limit
    graphs = load_graphs(settings.data, config.relations, limit)
    folder = output_folder(arguments.out, "strip.png", "0000")
    made_with = fingerprint(config) | {"prompts": len(graphs)}
    rows = finished_rows(folder / "results.json", made_with, arguments.resume)
    loop = build(config)
    judge, judge_name = loop.checker, "the Checker's own model"
    if settings.judge:
        judge, judge_name = load_judge(config, "evaluation.judge"), settings.judge.model
    graphs = loop.diffuser.readable(graphs, settings.data)
    counts = [len(graph.triples) for graph in graphs]

    say(f"evaluating {len(graphs)} prompts of {settings.data}; --resume keeps finished rows:")
    for trajectories in evaluate(loop, graphs, settings, config.relations, judge, rows):
        mass = fmean(t.best.reflection.mass for t in trajectories)
        told = f"the Checker's P(yes or no): {mass:.4f}"
        rounds = [step for t in trajectories for step in t.steps if step.source is not None]
        if rounds:
            malformed = fmean(step.instruction is None for step in rounds)
            told += f"; malformed completions: {malformed:.0%}"
        say(f"  {rows[-1].name} ({told})")
        made = tables(rows, counts, judge_name)
        results = {"tables": made, "rows": [vars(row) for row in rows], "made with": made_with}
        write(folder / "table.md", markdown(made))
        write(folder / "results.json", json.dumps(results, allow_nan=False) + "\n")
        if rows[-1].name.startswith("best of"):  # the page keeps the trajectories of the last loop
            report([folder])
        else:
            record(folder, trajectories)
    text = markdown(tables(rows, counts, judge_name))
    say(f"\n{text}{folder / 'table.md'}\n{folder / 'report.html'}")


def load_judge(config, key):
    """A `Checker` that takes no part in the loop. key: where the config has its `ModelConfig`."""
    part = functools.reduce(getattr, key.split("."), config)
    with naming(config, f"{key}.device"):
        device, dtype = device_and_dtype(part)
    with naming(config, f"{key}.model"):
        check_sums(part.model)
        judge = Checker.load(part.model, device, dtype, part.attention, batch_size=part.batch_size)
        judge.probe()
    return judge


def finished_rows(path, made_with, resume):
    """The rows of an interrupted evaluation; none for a new one.

    Raises ValueError if it is of another config, or if a new one would replace unfinished rows.
    """
    if not path.exists():
        return []
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**row) for row in results["rows"]]
        finished = rows[-1].name.startswith("best of")
        columns = [{name: len(values) for name, values in row.values.items()} for row in rows]
        if any(each != columns[0] or len(set(each.values())) != 1 for each in columns):
            raise ValueError("its rows differ in their columns")
        changed = differences(results["made with"], made_with)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); remove it, or set --out") from None
    if changed:
        reason = f"is of another config: {changed}"
        raise ValueError(f"{path}: {reason}; remove it, or set another --out")
    if not resume and not finished:
        raise ValueError(f"{path}: is unfinished; add --resume, or --out with another folder")
    return rows if resume else []


def main():
    parser = argparse.ArgumentParser(description="Evaluates the loop on held-out prompts.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a YAML value")
    parser.add_argument("--config", default="eval.yaml")
    parser.add_argument("--full", action="store_true", help="all prompts of the file")
    parser.add_argument("--resume", action="store_true", help="keep finished rows")
    parser.add_argument("--out", default="runs/eval", help="folder for table.md and results.json")
    arguments, unknown = parser.parse_known_intermixed_args()
    if unknown:
        parser.error(f"{unknown[0]} is no option; values of the YAML file are set as rounds=1")
    try:
        run(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(" ".join(f"eval.py: {error}".split()))


if __name__ == "__main__":
    main()
