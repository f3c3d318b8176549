import torch

# The tests' models are tiny: a second thread costs more than it gives.
torch.set_num_threads(1)
