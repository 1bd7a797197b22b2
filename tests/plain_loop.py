"""What one would write without this project.

    python plain_loop.py INPUT_DIR MODEL WEIGHTS DEVICE CSV [--whole]

Tokenizes the clips of train_curated, a clip at a time, a chunk at a time or the whole clip,
with Meta's model as it comes. benchmark.py runs it as a process of its own beside the script.
"""

import csv
import sys
from pathlib import Path

import reference
import standin
import torch

folder, name, weights, device, out, *whole = sys.argv[1:]
tokens_of = reference.whole if whole else reference.row
torch.backends.cudnn.allow_tf32 = False  # as in the script; for products it is off by default
model = standin.plain_model(name, Path(weights)).to(device)
model.set_target_bandwidth(6.0)
with open(f"{folder}/train_curated.csv", newline="") as file:
    rows = list(csv.DictReader(file))
with open(out, "w", newline="") as file:
    writer = csv.writer(file)
    for row in rows:
        codes = tokens_of(model, Path(folder, "train_curated", row["fname"]))
        writer.writerow([row["fname"], row["labels"], *codes.ravel()])
