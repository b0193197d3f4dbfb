"""In place of a script: writes what a study reads of it, at next to no cost.

    python stub_stage.py CONTROL ARM SEED STAGE CELL_FOLDER

Each start adds a line to CONTROL/calls. It fails if CONTROL/fail.<arm>.<seed>.<stage> exists, with the content as its
message, and waits while CONTROL/hang.<arm>.<seed>.<stage> exists; a SIGTERM then ends it as it ends training.
"""

import json
import os
import signal
import struct
import sys
import time
from pathlib import Path

control, arm, seed, stage, folder = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4], Path(sys.argv[5])
name = f"{arm}.{seed}.{stage}"
threads = os.environ["OMP_NUM_THREADS"]
with (control / "calls").open("a") as calls:
    calls.write(f"{name} pid={os.getpid()} threads={threads} gpu={os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
signal.signal(signal.SIGTERM, lambda *_: os._exit(75 if stage == "train" else 143))
while (control / f"hang.{name}").exists():
    time.sleep(0.01)
if (control / f"fail.{name}").exists():
    print("a line before it", file=sys.stderr)
    sys.exit((control / f"fail.{name}").read_text())
if stage == "train":
    (folder / "run").mkdir(exist_ok=True)
    row = {"step": 4, "train/loss": 5.0 + seed, "val/ar_loss": 4.0 + seed / 10, "perf/step_ms": time.time()}
    (folder / "run/metrics.jsonl").write_text(json.dumps(row) + "\n")
    header = json.dumps({"__metadata__": {"re-ar": json.dumps({"code": "stub"})}}).encode()
    (folder / "run/model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
if stage == "sweep":
    rows = [
        {"guidance_scale": scale, "choosing_half": 5 - scale, "other_half": 6 + seed - scale} for scale in (1.0, 2.0)
    ]
    (folder / "sweep").mkdir(exist_ok=True)
    (folder / "sweep/sweep.json").write_text(json.dumps({"distance": "fid", "settings": rows}))
if stage == "evaluate":
    metrics = {"frechet_distance": 50 + seed + (0 if arm.startswith("same") else len(arm))}
    (folder / "samples.efficientnet_lite0.json").write_text(json.dumps({"metrics": metrics}))
