"""Which temperature of the Actor is best for which row, on the validation prompts.

    python tiny/make/temperatures.py 0.3 0.5 0.7 1.0                 # every row of eval.yaml
    python tiny/make/temperatures.py 0.5 1.0 actor.adapter=runs/phase1/adapter rounds=6

Prints the exact SG-IoU of every loop after each round. The choice is in `eval.yaml`:
`evaluation.untrained_temperature` for the loop without training and `actor.temperature` for the
others.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from config import LoopConfig, load_config
from eval import Meter, bootstrap, first_images, systems
from loop import build
from sgiou import load_graphs
from tiny.world import exact_scores


def main():
    overrides = [word for word in sys.argv[1:] if "=" in word]
    temperatures = [float(word) for word in sys.argv[1:] if word not in overrides]
    config = load_config("eval.yaml", LoopConfig, overrides)
    graphs = load_graphs("tiny/data/val.json", config.relations)
    loop = build(config)
    first = loop.start(graphs, list(range(len(graphs))))
    print("| row | temperature | SG-IoU after each round | flow tokens of all edits |")
    print("|---|---|---|---|")
    for name, system in systems(loop):
        for temperature in temperatures:
            system.actor.temperature = temperature
            trajectories, means = first_images(first), []
            with Meter(loop) as meter:
                for _ in range(config.rounds):
                    system.advance(trajectories)
                    scores = exact_scores([t.best.image for t in trajectories], graphs)
                    means.append(bootstrap([score["sg_iou"] for score in scores])[0])
            tokens = meter.flow_tokens / len(graphs)
            rounds = " ".join(f"{mean:.3f}" for mean in means)
            print(f"| {name} | {temperature} | {rounds} | {tokens:.0f} |", flush=True)


if __name__ == "__main__":
    main()
