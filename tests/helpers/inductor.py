"""torch.compile's default backend, where it works."""

import pytest
import torch

LINKS = pytest.mark.skipif(" " in torch.__file__, reason="torch's inductor cannot link below a folder with a space")
