"""What a quantized model takes: at most its checkpoint and 5%, and less than 1.3 times that while it is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fusecomp.runtime.loading import load_model
from models.registry import FAMILIES, build
from tests.quant import packers
from tests.quant.checkpoints import make
from tests.quant.test_formats import ACTIVATIONS, AWQ, FP8, GPTQ, ct, ints, orders

BIG = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
CASES = {
    "gptq": (lambda w: packers.gptq(w, size=128, act_order=orders()), {**GPTQ, "group_size": 128}),
    "gptq, groups of 32": (packers.gptq, GPTQ),
    "gptq, 8 bits": (lambda w: packers.gptq(w, bits=8, size=64), {**GPTQ, "bits": 8, "group_size": 64}),
    "awq": (lambda w: packers.awq(w, size=64), {**AWQ, "group_size": 64}),
    "packed": (lambda w: packers.ct_packed(w, size=64, symmetric=False), ct(ints(4, size=64, symmetric=False))),
    "int8": ACTIVATIONS["int8 dynamic"][:2],
    "fp8": (lambda w: packers.fp8(w, 128, 128, "weight_scale_inv"), FP8),
}


def taken(model):
    return sum(tensor.nbytes for tensor in model.state_dict().values())


@pytest.mark.parametrize("case", CASES)
def test_size(tmp_path, case):
    checkpoint = make(tmp_path, "llama", *CASES[case], num_hidden_layers=1, **BIG)
    size = (checkpoint.folder / "model.safetensors").stat().st_size
    assert taken(checkpoint.load()) <= 1.05 * size


# Anonymous memory: pages of the file belong to the page cache and are given back when they are needed.
MEASURE = """
import json, sys, threading, time, torch
from fusecomp.runtime.loading import load_model

def anonymous():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["RssAnon"].split()[0]) * 1024

load_model(sys.argv[1], *json.loads(sys.argv[3]))
peak, base, done = 0, anonymous(), False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous() - base)
        time.sleep(0.0005)

options = json.loads(sys.argv[3])
thread = threading.Thread(target=watch)
thread.start()
model, _ = load_model(sys.argv[2], *options)
done = True
thread.join()
print(json.dumps(peak))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_while_loading(tmp_path):
    (tmp_path / "small").mkdir()
    small = make(tmp_path / "small", "qwen3-moe", packers.gptq, GPTQ)
    sizes = {"moe_intermediate_size": 512, "num_experts": 12, "hidden_size": 512, "num_hidden_layers": 2}
    pack = lambda w: packers.gptq(w, size=128)  # noqa: E731
    big = make(tmp_path, "qwen3-moe", pack, {**GPTQ, "group_size": 128}, **sizes)
    size = (big.folder / "model.safetensors").stat().st_size
    assert size > 10 << 20
    peak = measured_peak(small.folder, big.folder, "float32", "cpu")
    assert peak < 1.3 * size, f"{peak / size:.2f} of the checkpoint"


def measured_peak(small, big, *options):
    """Most bytes that loading `big` takes at a time, after `small` was loaded."""
    command = [sys.executable, "-c", MEASURE, str(small), str(big), json.dumps(options)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("scheme", ["fp8", "int4"])
def test_peak_while_quantizing(tmp_path, scheme):
    """At most the model in 16 bits and 30%: a weight is freed as soon as its codes exist."""
    sizes = {**BIG, "num_hidden_layers": 8, "intermediate_size": 1536}
    entry = FAMILIES["llama"]
    for name, changes in (("small", {}), ("big", sizes)):
        layers = changes.get("num_hidden_layers", entry.layers)
        changed = replace(entry, config={**entry.config, **changes}, layers=layers, windows=(0,) * layers)
        build(changed, torch.bfloat16).save_pretrained(tmp_path / name)
    size = (tmp_path / "big" / "model.safetensors").stat().st_size
    assert size > 50 << 20
    peak = measured_peak(tmp_path / "small", tmp_path / "big", "auto", "cpu", scheme, [list(range(3, 99))] * 2)
    assert peak < 1.3 * size, f"{peak / size:.2f} of the checkpoint"
    assert taken(load_model(tmp_path / "big", "auto", "cpu", scheme, ())[0]) < 0.6 * size
