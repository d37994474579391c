"""Run by torchrun: several commands of the command line in one job, and the example for two GPUs. Argument: a JSON list
of their arguments."""

import json
import sys
from pathlib import Path

from fastgen import cli, distributed
from fastgen.demos.examples import two_gpus

if __name__ == "__main__":
    with distributed.processes():
        for command in json.loads(sys.argv[1]):
            if command[0] == "two_gpus":
                two_gpus.main(command[1], steps=2)
            elif cli.main(command):
                sys.exit(f"{command} failed")
    left = [name for file in Path("/proc/self/task").glob("*/comm") if "gloo" in (name := file.read_text())]
    if left and "fsdp" not in sys.argv[1]:  # which holds the group
        sys.exit(f"threads that could abort the process at its end: {left}")
