"""Both engines, the same tests, on real models: against plain forwards of `transformers` in float32, and in bfloat16.

`pytest -m vllm tests/test_vllm.py` where vLLM is installed; each test prints its figures (`-s`).
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from conftest import RealModel

from pipeline.align.tokens import vocabulary_table
from pipeline.infer.engines import open_sampler, open_teacher
from pipeline.infer.sample import Response, _draw, seed_of
from pipeline.infer.score import Candidates, Scores
from pipeline.prepared import PreparedModel
from schemas.config import Model
from schemas.errors import OpdError

ROOT = Path(__file__).parents[1]
needs_vllm = (pytest.mark.vllm, pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed"))
ENGINES = ["transformers", pytest.param("vllm", marks=needs_vllm)]
pytestmark = pytest.mark.slow

MASS, K_MAX = 0.99, 20
BATCH_TOKENS, BATCH_SIZE = 4096, 128


def prepared(real: RealModel, engine: str, dtype: str, **options: Any) -> PreparedModel:
    """The model with newlines as stops."""
    settings = Model(model=real.ref.source, engine=engine, dtype=dtype, engine_options=options)  # type: ignore[arg-type]
    table = vocabulary_table(real.vocabulary, real.stop("\n"))
    return PreparedModel(real.ref, settings, SimpleNamespace(read=lambda: table))  # type: ignore[arg-type]


def figures(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b|, printed."""
    difference = np.abs(np.asarray(a, np.float64) - b)
    about = f"mean {difference.mean():.1e}, max {difference.max():.1e} over {len(difference)} tokens"
    print(f"\n  {name}: |dlogp| {about}", end="", flush=True)
    return difference


# ---- scoring ----


def passages(real: RealModel, count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Prompts that share most of their ids and responses of several lengths, at least `count` tokens of them.

    Some have the same prompt and start alike, some are the same, some are empty.
    """
    text = (ROOT / "docs/how.md").read_text() + (ROOT / "config/README.md").read_text()
    ids = np.array(real.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
    prompts, responses = [], []
    at, shared = 150, ids[:150]
    for n in (0, 5, 200, 77, 130, 31, 1, 64) * 20:
        own = ids[at : at + n % 10]
        prompts.append(np.concatenate([shared, own]))
        responses.append(ids[at + len(own) : at + len(own) + n])
        at += len(own) + n
        if sum(map(len, responses)) >= count:
            break
    assert sum(map(len, responses)) >= count, "the texts are too short"
    longest = int(np.argmax([len(r) for r in responses]))
    prompts += [prompts[longest]] * 3
    responses += [responses[longest], responses[longest][:100], np.append(responses[longest][:70], [11, 12, 13])]
    return prompts, [np.asarray(r, np.int32) for r in responses]


Score = Callable[[str, str, str], Scores]
TOKENS = {"smollm2": 1000, "gemma3": 400}


@pytest.fixture(scope="module")
def scores_of(smollm2: RealModel, gemma3: RealModel) -> Score:
    """Scores of `passages` by name of model, engine and dtype; each computed once."""
    real = {"smollm2": smollm2, "gemma3": gemma3}
    known: dict[tuple[str, str, str], Scores] = {}

    def get(name: str, engine: str, dtype: str) -> Scores:
        if (name, engine, dtype) not in known:
            prompts, responses = passages(real[name], TOKENS[name])
            longest = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
            with open_teacher(prepared(real[name], engine, dtype), longest, BATCH_TOKENS) as teacher:
                known[name, engine, dtype] = teacher.score(prompts, responses, Candidates(MASS, K_MAX))
        return known[name, engine, dtype]

    return get


def plain_logps(model: Any, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    """float64 (tokens + 1, vocab), from one forward over one sequence."""
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].double().log_softmax(-1).numpy()


def load(real: RealModel) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(real.ref.path, dtype=torch.float32).eval()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_scores_are_those_of_plain_forwards(
    name: str, engine: str, scores_of: Score, request: pytest.FixtureRequest
) -> None:
    real = request.getfixturevalue(name)
    prompts, responses = passages(real, TOKENS[name])
    scores, stop, model = scores_of(name, engine, "float32"), real.stop("\n"), load(real)
    bounds = np.concatenate([[0], np.cumsum(scores.cand_count)])
    expected: dict[str, list[float]] = {"logp": [], "entropy": [], "stop_logp": [], "tail": []}
    cand, row = [], 0
    for prompt, response in zip(prompts, responses, strict=True):
        for logp, token in zip(plain_logps(model, prompt, response), [*response.tolist(), None], strict=True):
            kept = scores.cand_id[bounds[row] : bounds[row + 1]]
            stopping = np.logaddexp.reduce(logp[stop])
            expected["logp"].append(stopping if token is None else logp[token])
            expected["entropy"].append(-(np.exp(logp) * logp).sum())
            expected["stop_logp"].append(stopping)
            expected["tail"].append(1 - np.exp(logp[kept]).sum() - np.exp(stopping))
            cand.append(logp[kept])
            # The kept are the likeliest but for stops, and they are enough.
            rest = np.delete(logp, np.concatenate([kept, stop]))
            assert len(kept) == 0 or rest.max() <= logp[kept].min() + 1e-3
            assert len(kept) == K_MAX or np.exp(logp[kept]).sum() + np.exp(stopping) >= MASS - 1e-4
            row += 1
    assert row == len(scores.logp) == sum(len(r) + 1 for r in responses)
    difference = figures(f"{name}, {engine} float32 and plain forwards", scores.logp, expected["logp"])
    assert difference.max() < 1e-3 and difference.mean() < 5e-5
    for key in ("entropy", "stop_logp"):
        np.testing.assert_allclose(getattr(scores, key), expected[key], atol=2e-3, err_msg=key)
    np.testing.assert_allclose(np.exp(scores.tail_logp), expected["tail"], atol=1e-4)
    np.testing.assert_allclose(scores.cand_logp, np.concatenate(cand), atol=2e-3)


@pytest.mark.parametrize("engine", [pytest.param(ENGINES[0], marks=needs_vllm), ENGINES[1]])
def test_bfloat16_costs_either_engine_the_same(engine: str, scores_of: Score) -> None:
    half, exact = scores_of("smollm2", engine, "bfloat16"), scores_of("smollm2", "transformers", "float32")
    difference = figures(f"{engine} bfloat16 and transformers float32", half.logp, exact.logp)
    assert 1e-3 < difference.mean() < 0.1 and difference.max() < 2


@pytest.mark.parametrize("engine", [ENGINES[1]])
@pytest.mark.parametrize(("dtype", "mean", "most"), [("float32", 5e-5, 1e-3), ("bfloat16", 0.1, 2)])
def test_engines_agree(engine: str, dtype: str, mean: float, most: float, scores_of: Score) -> None:
    ours, theirs = scores_of("smollm2", engine, dtype), scores_of("smollm2", "transformers", dtype)
    difference = figures(f"{engine} {dtype} and transformers {dtype}", ours.logp, theirs.logp)
    assert difference.mean() < mean and difference.max() < most


# ---- sampling ----

STEPS, TOP_K = 32, 5
RULES = [(1.0, 1.0), (0.7, 0.9)]
Sampled = tuple[list[np.ndarray], np.ndarray, dict[tuple[float, float], list[Response]]]


@pytest.fixture(scope="module")
def sampled_by(smollm2: RealModel) -> Callable[[str], Sampled]:
    """Prompts, stop ids, and responses to each of `RULES` in float32, by engine; each sampled once."""
    known: dict[str, Sampled] = {}

    def get(engine: str) -> Sampled:
        if engine not in known:
            words = ("red", "a river", "the moon", "seven", "bread", "a letter", "snow", "glass")
            texts = [f"Write about {w}{n * ' now'}:" for w in words for n in range(3)]
            prompts = [np.array(smollm2.tokenizer(text)["input_ids"], np.int32) for text in texts]
            stop = smollm2.stop("\n")
            seeds = [seed_of("test", text) for text in texts]
            with open_sampler(prepared(smollm2, engine, "float32"), 64, BATCH_SIZE) as sampler:
                known[engine] = (
                    prompts,
                    stop,
                    {rule: sampler.sample(prompts, seeds, STEPS, *rule, top_k=TOP_K) for rule in RULES},
                )
        return known[engine]

    return get


@pytest.mark.parametrize("engine", ENGINES)
def test_logps_are_those_of_a_forward_over_the_response(
    engine: str, sampled_by: Callable[[str], Sampled], smollm2: RealModel
) -> None:
    prompts, stop, by_rule = sampled_by(engine)
    model = load(smollm2)
    for rule, responses in by_rule.items():
        pairs: dict[str, list[tuple[float, float]]] = {"behavior_logp": [], "sampler_logp": []}
        for prompt, response in zip(prompts, responses, strict=True):
            halts = np.isin(response.ids, stop)
            assert not halts[:-1].any() and halts[-1] == response.stopped
            assert response.stopped or len(response.ids) == STEPS
            logp = torch.from_numpy(plain_logps(model, prompt, response.ids)[:-1])
            _, sampler_logp = _draw(logp, torch.zeros(len(logp), dtype=torch.float64), *rule)
            for at, token in enumerate(response.ids.tolist()):
                event = stop if halts[at] else [token]
                pairs["behavior_logp"].append((response.behavior_logp[at], float(logp[at, event].logsumexp(0))))
                pairs["sampler_logp"].append((response.sampler_logp[at], float(sampler_logp[at, event].logsumexp(0))))
            assert response.top_id.shape == (len(response.ids), TOP_K)
            # The order of two that are all but equal is rounding's.
            likeliest = logp.gather(1, torch.from_numpy(response.top_id.astype(np.int64)))
            torch.testing.assert_close(likeliest, logp.topk(TOP_K).values, atol=1e-3, rtol=0)
        assert {response.stopped for response in responses} == {True, False}
        for name, values in pairs.items():
            found, wanted = np.array(values).T
            finite = np.isfinite(wanted)  # a token at the nucleus' very border may be on its other side
            assert finite.mean() > 0.99
            difference = figures(f"{engine} {rule} {name}", found[finite], wanted[finite])
            assert difference.mean() < 1e-4
            assert np.quantile(difference, 0.99) < 1e-3


@pytest.mark.parametrize("engine", [ENGINES[1]])
def test_same_seeds_same_responses(engine: str, sampled_by: Callable[[str], Sampled]) -> None:
    _, _, ours = sampled_by(engine)
    _, _, theirs = sampled_by("transformers")
    for rule in RULES:
        same = [np.array_equal(a.ids, b.ids) for a, b in zip(ours[rule], theirs[rule], strict=True)]
        print(f"\n  {rule}: {sum(same)} of {len(same)} responses are the same", end="")
        assert np.mean(same) >= 0.9


# ---- stages and errors ----


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
@pytest.mark.parametrize("open_one", [open_teacher, open_sampler])
def test_without_vllm_the_message_says_what_to_install(open_one: Any, smollm2: RealModel) -> None:
    with (
        pytest.raises(OpdError, match=r"offline-opd\[vllm\]"),
        open_one(prepared(smollm2, "vllm", "bfloat16"), 9, 256),
    ):
        pass


@pytest.mark.parametrize("engine", [ENGINES[1]])
def test_too_little_memory_is_told_in_one_line(engine: str, smollm2: RealModel) -> None:
    starved = prepared(smollm2, engine, "bfloat16", kv_cache_memory_bytes=1 << 20)
    with pytest.raises(OpdError, match=r"engine_options.*kv_cache_memory_bytes.*KV cache") as caught:  # noqa: SIM117
        with open_teacher(starved, 8000, BATCH_TOKENS):
            pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", [ENGINES[1]])
def test_stages_from_prompts_to_units(engine: str, tmp_path: Path, smollm2: RealModel, gemma3: RealModel) -> None:
    """As `python -m` runs them: rollouts with the engine in a process of its own, all else with it in the stage's."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/models").symlink_to(Path(smollm2.ref.path).parent)
    questions = [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a in (12, 35, 58) for b in (21, 44, 67)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, questions)))
    settings = {
        "prompts": {"source": "prompts.jsonl", "splits": {"examples": 2, "train": 6, "dev": 0, "test": 1}},
        "student": {"model": smollm2.ref.source, "engine": engine},
        "teacher": {
            "model": gemma3.ref.source,
            "engine": engine,
            "engine_options": {"max_num_seqs": 4},
            "stop": ["\n"],
            "prompt": "{% for e in examples %}{{ e.prompt }} {{ e.answer }}\n{% endfor %}{{ prompt }} ",
        },
        "rollouts": {"rounds": 1, "prompts": 6, "max_new_tokens": 12, "top_k": 8},
        "scores": {"support": "union"},
        "evaluate": {"kl_items": 0},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))

    def stage(name: str, *arguments: str, **variables: str) -> str:
        command = [sys.executable, "-m", f"stages.{name}", "--config", "config.yaml", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPD_CACHE": str(tmp_path / "cache"), **variables}
        environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # its note on NUMA
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    stage("prompts")
    for role in ("student", "teacher"):
        stage("models", "--role", role)
    stage("rollouts", "--phase", "round-0", VLLM_ENABLE_V1_MULTIPROCESSING="1")
    said = stage("scores", "--phase", "round-0")
    # Our own lines and none of vLLM's; the audit is that of `transformers`.
    assert [line.split(": ")[0] for line in said.strip().splitlines()] == ["round-0 scores", "audit"], said
    stage("units", "--phase", "round-0")
    stage("policy", "--phase", "round-0")
    stage("evaluate", "--checkpoint", "0")

    run = tmp_path / "runs/default/round-0"
    identities = [
        json.loads((run / f"{table}/000.json").read_text())["identity"] for table in ("rollouts", "scores", "policy")
    ]
    assert [identity["engine"] for identity in identities] == [engine] * 3
    assert "max_num_seqs" not in json.dumps(identities)
    rollouts, units = (pl.read_parquet(run / f"{table}/000.parquet") for table in ("rollouts", "units"))
    lengths = rollouts["response_ids"].list.len()
    assert (
        lengths.to_list() == rollouts["behavior_logp"].list.len().to_list() == rollouts["top_id"].list.len().to_list()
    )
    covered = units.group_by("rollout_id", maintain_order=True).agg(pl.col("s_len").sum())
    assert covered["s_len"].to_list() == lengths.to_list()
    compared = units.filter(pl.col("kind") != "masked")
    assert len(compared) and compared["teacher_logp"].is_finite().all()
    # The policy's log-probs of its own rollouts are those that it sampled them with, up to bfloat16's rounding.
    logps = pl.read_parquet(run / "policy/000.parquet")["policy_logp"].explode() - rollouts["behavior_logp"].explode()
    assert logps.is_finite().all() and logps.abs().mean() < 0.1
    answers = pl.read_parquet(tmp_path / "runs/default/eval-0/answers.parquet")
    assert len(answers) == 1 and json.loads((tmp_path / "runs/default/eval-0/result.json").read_text())["items"] == 1
