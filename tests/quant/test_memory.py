"""What a quantized model takes: at most its checkpoint and 5%, and less than 1.3 times that while it is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fusecomp.quant.online import transform
from fusecomp.quant.online.rounding import make_codes
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


@pytest.mark.parametrize("scheme", ["fp8", "int4"])
def test_weights_are_freed_one_by_one(monkeypatch, scheme):
    """When a weight is rounded, none of those before it is in memory any more."""
    model = build(FAMILIES["llama"], torch.bfloat16)
    size, dead = taken(model), []
    every = [weakref.ref(p) for n, p in model.named_parameters() if n.endswith("_proj.weight")]

    def rounding(weight, *args, **options):
        dead.append(sum(ref() is None for ref in every))
        return make_codes(weight, *args, **options)

    monkeypatch.setattr(transform, "make_codes", rounding)
    transform.quantize_model(model, scheme, text=[list(range(3, 99))] * 2)
    assert len(dead) > 10 and dead == list(range(len(dead)))
    assert sum(ref() is None for ref in every) == len(dead) and taken(model) < size


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["fp8", "int8", "int4"])
def test_device_peak_of_online_quantization(tmp_path, scheme):
    """Eight layers of Llama-8B's size in bf16: the device never holds 1.3 times the checkpoint."""
    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 8,
    }
    with torch.device("cuda"):
        made = LlamaForCausalLM(LlamaConfig(vocab_size=99, **sizes)).bfloat16()
    made.save_pretrained(tmp_path)
    del made
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size > 3.4e9
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    text = [torch.arange(100).remainder(90).add(3).tolist()] * 8
    calibrated = None if scheme == "fp8" else text
    model, _ = load_model(tmp_path, "bfloat16", "cuda", scheme, calibrated)
    peak = torch.cuda.max_memory_allocated() - base
    print(f"{scheme}: peak {peak / size:.2f}, loaded {taken(model) / size:.2f} of the checkpoint")
    assert taken(model) < 0.6 * size
    assert peak <= 1.3 * size, f"{peak / size:.2f} of the checkpoint"
