"""What training sees through a shard against the same computed with both models in memory, on the two real models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import tiny
import torch

from pipeline.align.vocabularies import pair_ids
from pipeline.infer.shard_scores import ShardScores
from schemas.config import Objective
from schemas.tables import STOP_ID
from stages.run.context import open_prompts, policy, teacher
from stages.run.rounds import open_shards
from stages.run.run import open_run
from train.batch import Batch
from train.policy import UnitLogps, unit_logps
from train.recipes import losses
from train.stream import batches


def live_columns(
    wanted: ShardScores, units: pl.DataFrame, k: int, min_p: float
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(units of a response, k) student ids and log-probs of the teacher's k likeliest there, and its sum over each unit.

    From whole float32 softmaxes and a dictionary of bytes: nothing of scoring, rounding or mapping.
    """
    model = wanted.teacher.load().float()
    stop = wanted.teacher.stop.tolist()
    pairs = pair_ids(wanted.teacher.vocabulary, wanted.student.vocabulary)
    candidates, sums = [], []
    prompts = [ids for group in wanted.teacher_prompts for ids in group]
    rollouts = wanted.rollouts.read()
    names, texts = (rollouts[column].to_pylist() for column in ("rollout_id", "response"))
    for prompt, name, text in zip(prompts, names, texts, strict=True):
        own = wanted.teacher.tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *own]])).logits[0, len(prompt) - 1 :].double()
        logp = logits.log_softmax(-1)
        end = logp[:, stop].logsumexp(-1)

        def said(j: int, logp: torch.Tensor = logp, own: list[int] = own) -> float:
            """Log-prob of the realised token; what stops the teacher has the mass of all that is kept nowhere."""
            p = logp[j].exp()
            if own[j] not in stop:
                return float(logp[j, own[j]])
            p[stop] = 0
            kept = p.topk(k).values
            return float(torch.minimum(logp[j, own[j]], (p.sum() - kept[kept >= min_p].sum()).log()))

        table: list[dict[int, float]] = []
        found = []
        for row in units.filter((pl.col("rollout_id") == name) & (pl.col("kind") != "masked")).to_dicts():
            at = row["t_start"]
            best = [i for i in logp[at].topk(k + len(stop)).indices.tolist() if i not in stop][:k]
            table.append({int(pairs[i]): float(logp[at, i]) for i in best if pairs[i] >= 0} | {STOP_ID: float(end[at])})
            span = range(at, at + row["t_len"])
            found.append(float(end[at]) if row["kind"] == "stop" else sum(said(j) for j in span))
        candidates.append(table)
        sums.append(np.array(found))
    return candidates, sums


def gradient(model: Any, found: UnitLogps, batch: Batch, objective: Objective) -> tuple[float, torch.Tensor]:
    loss = losses(found, batch, objective).loss
    total = (batch.weight * loss).sum() / len(loss)
    slopes = torch.autograd.grad(total, list(model.parameters()), retain_graph=True)
    return float(total.detach()), torch.cat([slope.flatten() for slope in slopes])


def compare() -> None:
    """Loss and gradient of the finished run in the working directory, from its shards and live."""
    run = open_run(Path("runs/default/config.yaml"))
    config = run.config
    shards = open_shards(run.phase("round-0"))
    (step,) = batches(shards[:1], 100, 10**6, 0, range(1))
    (batch,) = step.parts
    student = policy(run, 0)
    wanted = ShardScores(config, shards[0][0], open_prompts(run), teacher(run), student)
    units = pl.DataFrame(pl.from_arrow(shards[0][1].read()))
    candidates, sums = live_columns(wanted, units, config.scores.k_max, config.scores.min_p)
    names = shards[0][0].read()["rollout_id"].to_pylist()

    # The same units in the batch's order; each candidate of the shard with its live log-prob.
    cand_logp, teacher_logp = torch.full_like(batch.cand_logp, -torch.inf), torch.zeros_like(batch.teacher_logp)
    seen = dict.fromkeys(names, 0)
    missing = extra = 0.0
    for u, response in enumerate(batch.response_of_unit.tolist()):
        name = batch.responses[response]
        live, at = candidates[names.index(name)][seen[name]], seen[name]
        seen[name] += 1
        teacher_logp[u] = sums[names.index(name)][at]
        used = batch.cand_logp[u] > -torch.inf
        ids = batch.cand_id[u][used].tolist()
        cand_logp[u, : len(ids)] = torch.tensor([live.get(i, -np.inf) for i in ids])
        kept = {i for i in ids if i in live}
        extra += len(ids) - len(kept)
        missing += sum(
            np.exp(p) > config.scores.min_p * 1.05 for i, p in live.items() if i not in kept and i != STOP_ID
        )
    assert missing == extra == 0  # the shard keeps what the live teacher finds likely enough, and nothing else

    live_batch = replace(batch, cand_logp=cand_logp, teacher_logp=teacher_logp)
    model = student.load().float()
    stop = torch.from_numpy(student.stop.astype(np.int64))
    found = unit_logps(model, batch, stop)  # the student's side is the same
    for recipe in ("hybrid", "simct", "forward_kl", "dpca"):
        objective = tiny.objective(recipe=recipe)
        (cached, g), (live_loss, h) = (gradient(model, found, b, objective) for b in (batch, live_batch))
        relative = float((g - h).norm() / h.norm())
        print(
            f"\n  {recipe}: loss {cached:.5f} cached, {live_loss:.5f} live; gradient off by {100 * relative:.2f} %",
            end="",
        )
        # 5 binary digits of each candidate's log-prob; the sampled path reads the realised ones, which are exact.
        exact = recipe == "dpca"
        assert cached == pytest.approx(live_loss, rel=3e-4 if exact else 5e-3)
        assert relative < (2e-3 if exact else 0.03)
