"""What each decision of the training is worth: `python tiny/make/ablations.py 1` (or 2: the phase).

Trains the phase with one thing changed at a time, on the same budget, and measures every adapter on
the validation prompts by the exact parser. Finished runs are kept in runs/ablations and not
repeated.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
from table import bootstrap

ROWS = ("1 round", "loop")  # of eval.py, with the phase that is trained
VARIANTS = {
    1: {
        "as shipped": [],
        "no KL": ["kl=0"],
        "fresh edit noise": ["shared_noise=false"],
        "sampled yes or no": ["sampled_reward=true"],
        "states of round 1 only": ["rounds=1"],
    },
    2: {
        "as shipped": [],
        "no KL": ["kl=0"],
        "fresh initial latents": ["shared_noise=false"],
        "sampled yes or no": ["sampled_reward=true"],
        "states of round 1 only": ["rounds=1"],
        "all SDE steps": ["window=7", "window_start=0"],
    },
}


def run(*arguments):
    """Runs one of the programs; its failure is ours."""
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("phase", type=int, choices=(1, 2))
    parser.add_argument("overrides", nargs="*", help="key=value for all variants, such as a seed")
    arguments = parser.parse_args()
    part, trained = (("actor", "1"), ("editor", "1 + 2"))[arguments.phase - 1]
    found = {}
    for name, changes in VARIANTS[arguments.phase].items():
        words = [f"phase{arguments.phase}", *arguments.overrides, name]
        folder = ROOT / "runs" / "ablations" / "_".join(words).replace(" ", "_").replace("/", "-")
        results = folder / "eval" / "results.json"
        if not results.exists():
            more = ["--resume"] if (folder / "checkpoint.safetensors").exists() else []
            changes = [*arguments.overrides, *changes, f"run={folder}"]
            run("train.py", "--phase", arguments.phase, *changes, *more)
            adapters = [f"{part}.adapter={folder / 'adapter'}"]
            adapters += [o for o in arguments.overrides if ".adapter=" in o]
            run("eval.py", "evaluation.data=tiny/data/val.json", *adapters, "--out", results.parent)
        rows = {row["name"]: row for row in json.loads(results.read_text())}
        found[name] = [rows[f"{row} + phase {trained}"]["values"]["sg_iou"] for row in ROWS]
    print(f"| variant | {' | '.join(f'{row} | against as shipped' for row in ROWS)} |")
    print("|---" * (1 + 2 * len(ROWS)) + "|")
    for name, columns in found.items():
        cells = [name]
        for values, shipped in zip(columns, found["as shipped"]):
            cells.append(f"{bootstrap(values)[0]:.3f}")
            cells.append("{:+.3f} [{:+.3f}, {:+.3f}]".format(*bootstrap(values, shipped)))
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
