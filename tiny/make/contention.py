"""Seconds per iteration of phase 1, alone and beside a second run.

    python tiny/make/contention.py

OpenMP threads that wait for one another spin. If a second busy process takes their cores, they spin
through whole time slices, and both processes become many times slower. This compares the settings
that limit it. Needs an otherwise idle machine and about 15 minutes on two cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SETTINGS = {
    "GOMP_SPINCOUNT=300000 (the library's default)": {"GOMP_SPINCOUNT": "300000"},
    "GOMP_SPINCOUNT=1000 (the default of train.py)": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=0 OMP_WAIT_POLICY=PASSIVE": {
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
    },
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}


def seconds_per_iteration(variables, processes, iterations):
    """The mean over `processes` simultaneous runs, without their first iteration."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    environment = {k: v for k, v in os.environ.items() if k not in names} | variables
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for number in range(processes):
            settings = [f"run={folder}/{number}", f"iterations={iterations + 1}"]
            settings += ["validate_every=1000", "validation_limit=1"]
            command = [sys.executable, "train.py", "--phase", "1", *settings]
            quiet = {"stdout": subprocess.DEVNULL, "cwd": ROOT, "env": environment}
            running.append(subprocess.Popen(command, **quiet))
        if any([process.wait() for process in running]):
            sys.exit("a run failed; its message is above")
        seconds = []
        for number in range(processes):
            lines = (Path(folder) / str(number) / "seconds.jsonl").read_text().splitlines()[1:]
            seconds += [json.loads(line)["seconds"] for line in lines]
    return sum(seconds) / len(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=3, help="timed iterations of a run")
    iterations = parser.parse_args().iterations
    print("| setting | alone | beside a second run |\n|---|---|---|")
    for name, variables in SETTINGS.items():
        times = [seconds_per_iteration(variables, count, iterations) for count in (1, 2)]
        print(f"| {name} | {times[0]:.1f} s | {times[1]:.1f} s |", flush=True)


if __name__ == "__main__":
    main()
