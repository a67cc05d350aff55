import sys
from pathlib import Path

import torch

# The federation helpers are shared by several folders of tests.
sys.path.insert(0, str(Path(__file__).parent))

torch.set_num_threads(1)
