"""torch.export and ONNX of a low-rank network: torch's own products, any batch size, and no need for condlr_ext at
run time. The ONNX part needs onnxscript.
"""

import copy
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import condlr_ext

bunch = load_digits()
x, y = torch.tensor(bunch.images / 16, dtype=torch.float32)[:, None], torch.tensor(bunch.target)

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
    nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Linear(64, 10),
)  # fmt: skip
condlr_ext.factorize(model, budget=0.3, exclude=["0", "7"])
optimizer = condlr_ext.optim.CondLRSGD(model, lr=0.1, momentum=0.9, tau=0.1)
for index in torch.randperm(len(x)).repeat(3).split(64):
    optimizer.zero_grad()
    F.cross_entropy(model(x[index]), y[index]).backward()
    optimizer.step()
model.eval()

folder = Path(tempfile.mkdtemp())
batch = torch.export.Dim("batch", min=1)
program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: batch},))
print("ops:", ", ".join(sorted({str(n.target) for n in program.graph.nodes if n.op == "call_function"})))
torch.export.save(program, folder / "model.pt2")
torch.save((x, model(x).detach()), folder / "data.pt")
code = """
import sys, torch
x, y = torch.load("data.pt")
difference = (torch.export.load("model.pt2").module()(x) - y).abs().max().item()
print(f"another process: difference {difference:.1e}, condlr_ext imported: {'condlr_ext' in sys.modules}")
"""
subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)

if importlib.util.find_spec("onnxscript"):
    torch.onnx.export(model, (x[:2],), folder / "model.onnx", dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    print("ONNX:", sum(file.stat().st_size for file in folder.glob("model.onnx*")), "bytes")
else:
    print("ONNX: pip install onnxscript")
folded = torch.export.export(condlr_ext.fold(copy.deepcopy(model)), (x[:2],), dynamic_shapes=({0: batch},))
dense = sum(p.numel() for p in condlr_ext.to_dense(model).parameters())
kept, fewest = (sum(t.numel() for t in p.state_dict.values()) for p in (program, folded))
print(f"parameters: {kept}, {fewest} with U S as one matrix, dense {dense}")
