"""One thread: the tests' models are too small to gain from more, and several workers share the machine."""

import torch

torch.set_num_threads(1)
