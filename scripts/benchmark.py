"""Measure a part of this project and its published counterpart, alternately in one run; predict the speed of a GPU.

    python scripts/benchmark.py sampling --width 64 --layers 2 --tokens 64 256 --batch 4
    python scripts/benchmark.py training --width 256 --layers 4 --tokens 256 --batch 64 --classes 20
    python scripts/benchmark.py data --lines 100000 1000000
    python scripts/benchmark.py tokenizer outputs/mine/tokenizer.yaml --steps 500
    python scripts/benchmark.py kernels
    python scripts/benchmark.py predict --config configs/rear_b.yaml --gpu h200 h100 a100

`benchmark.py COMMAND --help` lists the options. The first three check that both ways compute the same, then measure
them alternately. `tokenizer` compares choices of a training;
`kernels` and `predict` compile for a GPU, without one. Prints a table and, last, one line of JSON.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

from utils.errors import input_errors_exit
from utils.run.run_environment import describe_environment

COMMANDS = ("sampling", "training", "data", "tokenizer", "kernels", "predict")  # modules of scripts/benchmarks


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {name: importlib.import_module(f"scripts.benchmarks.{name}") for name in COMMANDS}
    for name, module in modules.items():
        module.add_arguments(commands.add_parser(name, description=str(module.__doc__).splitlines()[0]))
    arguments = parser.parse_args(argv)
    print(describe_environment(), end="")
    figures = modules[arguments.command].run(arguments)
    print(json.dumps({"command": arguments.command, **figures}))


if __name__ == "__main__":
    with input_errors_exit():
        main(sys.argv[1:])
