"""Entries of the benchmark for its tests, of a low rank and of few kinds."""

from pathlib import Path

from lorascope.bench.entries import Entry
from lorascope.bench.peers import Recipe
from lorascope.bench.race import Protocol

PEERS_DIR = Path(__file__).parents[1] / "benchmarks" / "peers"
SHORT = Protocol(num_warm_ups=1, num_blocks=2, num_steps=2)
CACHED = Recipe(cached=True, channels_last=True, fused=True)
REFERENCE = Entry("R", "plain", "reference", (4,))
RIGHT = [
    Entry("P1", "as shipped", "peft", (4,), recipe=Recipe(cached=False, clips=False), max_grad_norm=0.0),
    Entry("P2", "repaired", "peft", (4,), recipe=Recipe(cached=False)),
    Entry("P3", "kohya", "kohya", (4,)),
    Entry("P4", "cached", "peft", (4,), recipe=CACHED),
    Entry("P4b", "cached", "peft", (4,), "bf16", recipe=CACHED, tolerance="bf16"),
    Entry(
        "PX",
        "autocast, bf16 adapters",
        "peft",
        (4,),
        "bf16",
        Recipe(cached=False, autocast=True, fp32_adapters=False),
        "bf16 adapters",
    ),
    Entry("O1", "ours", "ours", (4,)),
    Entry("O1b", "ours", "ours", (4,), "bf16", tolerance="bf16"),
    Entry("O6", "ours, stacked", "ours", (4, 8, 4)),
    Entry("K1", "T-LoRA, ours", "ours", (4,), adapter="tlora"),
    Entry("K2", "DoRA, ours", "ours", (4,), adapter="dora"),
    Entry("K3", "DoRA, PEFT", "peft", (4,), recipe=CACHED, adapter="dora"),
]
