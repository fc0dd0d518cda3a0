"""Settings of every test: one thread, so that small problems are not lost in the cost of waking threads."""

import torch

torch.set_num_threads(1)
