"""Trains a model by a recipe.

deepspeed [--num_gpus N] scripts/train.py --recipe tiny
"""

from uno_ds.commands.json_output import reserve_stdout

if __name__ == "__main__":
    reserve_stdout()
    from uno_ds.commands.runner import end_process
    from uno_ds.commands.train import main

    end_process(main())
