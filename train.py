"""Trains a network: python train.py --config configs/quickstart.py --workdir runs/quickstart."""

from jdecouple.__main__ import main

if __name__ == "__main__":
    main("jdecouple.train.cli:main")
