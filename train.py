"""Trains a network: python train.py --config configs/quickstart.py --workdir runs/quickstart."""

from jdecouple.command_line import main

if __name__ == "__main__":
    main()
