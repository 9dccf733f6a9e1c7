"""One thread a test process: small tensors are slower on more, and sums are the same everywhere."""

import torch

torch.set_num_threads(1)
