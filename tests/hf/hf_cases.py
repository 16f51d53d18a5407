"""What the tests of `generate` share: prompts, a batch of them, a streamer that keeps what it was given."""

from __future__ import annotations

import torch

PROMPTS = [[5, 17, 42, 99, 7], [33, 8], [250, 61, 61, 4, 19, 120, 11]]


def batch(prompts=PROMPTS, pad=0):
    """Left-padded ids [B, P] and their mask."""
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[pad] * (longest - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
    }


def middle_token(stock, prompt, position=4):
    """A token that greedy decoding of `prompt` produces in mid-text, to be taken as an end of sequence."""
    return int(stock.generate(torch.tensor([prompt]), max_new_tokens=12, eos_token_id=None)[0, len(prompt) + position])


class Recorder:
    """A streamer that keeps what it was given."""

    def __init__(self):
        self.events = []

    def put(self, value):
        self.events.append((tuple(value.shape), value.dtype, value.tolist()))

    def end(self):
        self.events.append("end")
