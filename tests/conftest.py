"""Shared by all tests: the project on the path, one thread, one miniature CLIP."""
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)       # small models: a second thread costs more than it gives


@pytest.fixture
def mini():
    """A random CLIP of 2 blocks and width 64 with 16-pixel patches; needs no vocabulary file."""
    import clip
    torch.manual_seed(0)
    return clip.CLIP(embed_dim=48, image_resolution=64, vision_layers=2, vision_width=64,
                     vision_patch_size=16, context_length=77, vocab_size=514, transformer_width=64,
                     transformer_layers=2).eval()
