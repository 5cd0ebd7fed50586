"""Trains a model by a recipe: deepspeed [--num_gpus N] scripts/train.py --recipe tiny"""
import sys

from uno_ds.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
