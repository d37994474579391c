"""`python -m fastgen.demonstrations NAME --out DIR`."""

import argparse
import json
import sys
from pathlib import Path

from fastgen import demonstrations


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 where scikit-learn is missing, OUT cannot be written or the usage is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m fastgen.demonstrations",
        description=demonstrations.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [*demonstrations.DEMONSTRATIONS, "all"]
    parser.add_argument("name", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--out", type=Path, default=Path("runs/demonstrations"), help="folder for pictures and numbers")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)  # before anything takes time
        for name in demonstrations.DEMONSTRATIONS if arguments.name == "all" else [arguments.name]:
            numbers = demonstrations.DEMONSTRATIONS[name](arguments.out, seed=arguments.seed)
            print(f"{name}: {json.dumps(numbers, indent=2)}", flush=True)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
