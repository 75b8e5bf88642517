"""Trains a network: python train.py --config configs/quickstart.py --workdir runs/quickstart."""

from jdecouple.train.cli import main

if __name__ == "__main__":
    main()
