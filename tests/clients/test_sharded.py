"""accelerate's FSDP2, Lightning's ModelParallelStrategy and the Trainer's FSDP2, each on two processes with gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = (
    "accelerate", "accelerate-projector", "accelerate-sharded-before", "lightning", "trainer-class",
    "trainer-create_optimizer",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_sharded_training_is_that_of_the_whole_network(case, tmp_path):
    script = ROOT / "tests" / "clients" / "sharded.py"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, case],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
