"""``python -m veneer``: the command line, as ``torchrun -m veneer`` starts it."""

from veneer.cli.main import run

if __name__ == "__main__":
    run()
