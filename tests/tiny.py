"""Tiny real models and shards for tests of the trainer: random weights, but the true classes, files and formats."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import TypeAdapter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.store.shards import open_shard, open_writer
from schemas.config import Objective
from schemas.tables import STOP_ID, arrow_schema
from train.stream import Triple

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.35,
}
"""Of architectures that are compared with themselves."""
VOCAB, STOP = 97, np.array([2, 3], np.int32)


def objective(**keys: Any) -> Objective:
    """The section `objective` with these keys."""
    return TypeAdapter(Objective).validate_python(keys)


def model(seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool = True) -> Any:
    """A two-layer Llama over 97 tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def saved(folder: Path, merges: list[tuple[str, str]], chat: bool = False) -> None:
    """A prepared model: the same two layers over a byte-level BPE tokenizer with these merges, `chat` in ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|im_end|>", "<|im_start|>"] if chat else ["<|end|>"]
    tokens = [*special, *alphabet, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0])
    fast.chat_template = CHATML if chat else None
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def saved_pair(folder: Path) -> tuple[str, str]:
    """Prepared models `student` and `teacher` with other tokens; their names."""
    saved(folder / "student", [])
    saved(folder / "teacher", [("a", "b"), ("Ġ", "a"), ("1", "2")])
    return "student", "teacher"


def shards(folder: Path, responses: int = 20, group: int = 8, count: int = 2, seed: int = 0) -> list[Triple]:
    """`count` shards of random rollouts with units (some n:m, some masked, stops) and weights, in row groups of `group`."""
    rng = np.random.default_rng(seed)
    for shard in range(count):
        tables: dict[str, list[dict[str, Any]]] = {"rollouts": [], "units": [], "weights": []}
        writers = {}
        paths = {name: folder / name / f"{shard:03}.parquet" for name in tables}
        with (
            open_writer(paths["rollouts"], "rollouts", {}, {}) as writers["rollouts"],
            open_writer(paths["units"], "units", {}, {}) as writers["units"],
            open_writer(paths["weights"], "weights", {}, {}) as writers["weights"],
        ):
            for start in range(0, responses, group):
                rows: dict[str, list[dict[str, Any]]] = {name: [] for name in tables}
                for index in range(start, min(start + group, responses)):
                    _response(rng, f"s{shard}-r{index}", rows)
                for name, writer in writers.items():
                    writer.write(pa.Table.from_pylist(rows[name], schema=arrow_schema(name)))
    return open_shards(folder)


def open_shards(folder: Path) -> list[Triple]:
    """What `shards` wrote."""
    numbers = [path.name for path in sorted((folder / "rollouts").glob("*.parquet"))]
    tables = ("rollouts", "units", "weights")
    return [tuple(open_shard(folder / kind / name, kind) for kind in tables) for name in numbers]  # type: ignore[misc]


def _response(rng: np.random.Generator, name: str, rows: dict[str, list[dict[str, Any]]]) -> None:
    stopped = bool(rng.random() < 0.5)
    length = int(rng.integers(1, 9))
    ids = rng.integers(4, VOCAB, length).tolist()
    if stopped:
        ids[-1] = int(rng.choice(STOP))
    rows["rollouts"].append(
        {
            "rollout_id": name,
            "prompt_id": "p",
            "sample": 0,
            "round": 0,
            "prompt_ids": rng.integers(4, VOCAB, int(rng.integers(1, 12))).tolist(),
            "response_ids": ids,
            "response": "",
            "behavior_logp": (-rng.random(length)).tolist(),
            "sampler_logp": None,
            "top_id": None,
            "finish_reason": "stop" if stopped else "length",
            "answer": None,
        }
    )
    at, unit = 0, 0
    body = length - stopped
    while at < length:
        stop = stopped and at == body
        size = 1 if stop else int(min(rng.integers(1, 4), body - at))
        kind = "stop" if stop else "masked" if rng.random() < 0.1 else "1:1" if size == 1 else "n:m"
        masked = kind == "masked"
        cand = [] if masked else [*rng.choice(np.arange(4, VOCAB), 5, replace=False).tolist(), STOP_ID]
        share = rng.dirichlet(np.ones(len(cand) + 2)) if cand else np.ones(2)
        rows["units"].append(
            {
                "rollout_id": name,
                "unit": unit,
                "kind": kind,
                "s_start": at,
                "s_len": size,
                "t_start": at,
                "t_len": 0 if stop else size,
                "byte_start": at,
                "byte_end": at + size,
                "teacher_logp": None if masked else float(np.log(share[-1])),
                "teacher_entropy": None if masked else float(-(share * np.log(share)).sum()),
                "t_log_z": None if masked else (size - 1) / 4,
                "cand_id": cand,
                "cand_logp": np.log(share[: len(cand)]).tolist(),
                "tail_logp": None if masked else float(np.log(share[-2])),
                "dropped_logp": None if masked else -np.inf,
            }
        )
        rows["weights"].append(
            {
                "rollout_id": name,
                "unit": unit,
                "student_logp": None if masked else -1 - unit / 8,
                "advantage": -unit / 4,
                "credit": -unit / 4,
                "weight": float(1 + rng.random() / 2),
                "is_ratio": 1 + at / 16,
            }
        )
        at, unit = at + size, unit + 1
