"""Run by torchrun: several commands of the command line in one job. Argument: a JSON list of their arguments."""

import json
import sys

from fastgen import cli, distributed

if __name__ == "__main__":
    with distributed.processes():
        for command in json.loads(sys.argv[1]):
            if cli.main(command):
                sys.exit(f"{command} failed")
