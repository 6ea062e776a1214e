"""Saving the state of a sharded model: `torchrun --nproc-per-node 2 benchmarks/states.py`, over gloo on the CPU.

A model with random weights takes one optimiser step, then each rank's resident memory is watched while the state is saved: as
the trainer does it, each rank its own pieces, and by gathering it on rank 0, which is how it once was done.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import memory
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from schemas.config import Train
from train.checkpoint import save_pieces, save_state
from train.distributed import full, piece, processes, rank, shard, wait_for_all
from train.optimiser import MasterAdamW


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="of hidden states")
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    with processes():
        torch.manual_seed(0)
        sizes = {"hidden_size": options.width, "intermediate_size": 3 * options.width, "num_attention_heads": 8}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, num_hidden_layers=options.layers, **sizes)).eval()
        count = sum(parameter.numel() for parameter in model.parameters())
        shard(model)
        optimiser = MasterAdamW(model, Train())
        for name, master in optimiser.state().items():
            if name.startswith("master/"):
                master.grad = torch.zeros_like(master)
        optimiser.step(0.0)
        state = optimiser.state()
        own = sum(part.nbytes for part, _ in map(piece, state.values()))
        folder = Path(tempfile.gettempdir()) / "opd-states"
        if rank() == 0:
            print(f"{count / 1e6:.0f} million weights, {own / 1e6:.0f} MB of the state on rank 0\n")
            print("| | seconds | rank 0 took beside it, MB |\n|---|---|---|")
        for way in ("pieces", "gathered"):
            wait_for_all()
            before, began = memory.resident(), time.perf_counter()
            memory.restart_peak()
            if way == "pieces":
                save_pieces(folder / "state-00000001", state, {})
            else:
                whole = {name: full(tensor) for name, tensor in state.items()}
                if rank() == 0:
                    save_state(folder / "state-00000002.safetensors", whole, {})
                del whole
            wait_for_all()
            if rank() == 0:
                taken = (memory.peak() - before) / 1e6
                print(f"| {way} | {time.perf_counter() - began:.1f} | {taken:.0f} |", flush=True)
        if rank() == 0:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
