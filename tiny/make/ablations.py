"""What each decision of the training is worth: `python tiny/make/ablations.py 1` (or 2: the phase).

Trains the phase with one thing changed at a time, on the same budget, and measures every adapter on
the validation prompts by the exact parser. Finished runs stay in runs/ablations and are kept.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
from eval import bootstrap

VARIANTS = {
    1: {
        "as shipped": [],
        "no KL": ["kl=0"],
        "states of round 1 only": ["rounds=1"],
        "groups of 4": ["groups=32", "group_size=4"],
        "groups of 16": ["groups=8", "group_size=16"],
        "new images for flat groups": ["refill=true"],
    },
    2: {
        "as shipped": [],
        "no KL": ["kl=0"],
        "states of round 1 only": ["rounds=1"],
        "all SDE steps": ["window=2", "latest_window_start=0"],
    },
}


def run(*arguments):
    """Runs one of the programs, and fails if it fails."""
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("phase", type=int, choices=(1, 2))
    parser.add_argument("overrides", nargs="*", help="key=value for all variants, such as a seed")
    arguments = parser.parse_args()
    part, row = (("actor", "loop + phase 1"), ("editor", "loop + phase 1 + 2"))[arguments.phase - 1]
    found = {}  # variant -> SG-IoU of every validation prompt
    for name, changes in VARIANTS[arguments.phase].items():
        words = [f"phase{arguments.phase}", *arguments.overrides, name]
        folder = ROOT / "runs" / "ablations" / "_".join(words).replace(" ", "_").replace("/", "-")
        results = folder / "eval" / "results.json"
        if not results.exists() or "best of" not in results.read_text():  # that row comes last
            more = ["--resume"] if (folder / "checkpoint.safetensors").exists() else []
            changes = [*arguments.overrides, *changes, f"run={folder}"]
            run("train.py", "--phase", arguments.phase, *changes, *more)
            adapters = [f"{part}.adapter={folder / 'adapter'}"]
            adapters += [o for o in arguments.overrides if ".adapter=" in o]
            more = ["--resume"] if results.exists() else []
            data = "evaluation.data=tiny/data/val.json"
            run("eval.py", data, *adapters, "--out", results.parent, *more)
        rows = {each["name"]: each for each in json.loads(results.read_text())["rows"]}
        found[name] = rows[row]["values"]["sg_iou"]
    print(f"| variant | {row} | against as shipped |\n|---|---|---|")
    for name, values in found.items():
        against = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*bootstrap(values, found["as shipped"]))
        print(f"| {name} | {bootstrap(values)[0]:.3f} | {against} |")


if __name__ == "__main__":
    main()
