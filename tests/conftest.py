"""Before any test: the project and its weights/ can be imported, one thread computes."""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "weights"))
sys.path.insert(0, str(ROOT / "tests"))          # mini.py, evaluate.py
torch.set_num_threads(1)       # small models: a second thread costs more than it gives
