"""vLLM as an engine: it runs the model's body, what is made of it is this package's own code, the same for every engine.

For scoring it gives final-norm hidden states, which `pipeline.infer.score` reads like those of a `transformers` model. For
sampling `pipeline.infer.vllm_worker` draws each token inside of vLLM from its logits, with the same uniforms, warping and
log-probs as `pipeline.infer.sample`; so that only the forward passes differ, by what rounding does to them.

Tested with vLLM 0.32 on CPUs: dense models, without compilation, the engine in this process, in one of its own and over two
workers. Nothing here is specific to CPUs, but no GPU has run it. It needs the V1 model runner: V2 has another interface
for logits processors.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
import torch
from llvmlite.binding import ffi

from pipeline.infer.forward import batches
from pipeline.infer.sample import Response
from schemas.errors import OpdError, one_line

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no second process when one suffices
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default pins this process's threads to cores
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Defaults, read when vllm is first imported; what the user's environment sets wins."""

CPU_DEFAULTS = {
    "block_size": 32,  # shared prompts are reused in whole blocks; the CPU kernels want a multiple of 32
    "kv_cache_memory_bytes": 1 << 30,  # else it takes nearly all of the machine's memory
}

HIDDEN_BYTES = 1 << 30
"""float32 hidden states held at once, bytes."""

# On CPUs vLLM 0.32 looks into the `__dict__` of all that is imported, in workers too, which import this module with the
# stage that started them. The library object of numba's llvmlite would hand out a C function under that name.
getattr(ffi.lib, "_fntab", {})["__dict__"] = {}

_keys = count()


@contextmanager
def open_engine(folder: str, dtype: str, longest: int, pooling: bool, options: dict[str, Any]) -> Iterator[Any]:
    """A `vllm.LLM`; its memory is free again when the context ends.

    Args:
        folder: a prepared model with its tokenizer.
        dtype: of the forward pass, by name.
        longest: tokens of the longest sequence it will see, prompt and response together.
        pooling: for `hidden_rows`; else for `sample`.
        options: keyword arguments of `vllm.LLM` that say how to run it, not what to compute.
    Raises:
        OpdError: vllm isn't installed, can't run this model or sequences as long, or runs out of memory; also from within the
            context.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Without this it would lower torch to one thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    set_num_threads = torch.set_num_threads
    try:
        llm = _load(folder, dtype, longest, pooling, options)
    except OpdError:
        raise
    except Exception as error:  # of any kind: each of its layers has its own
        raise OpdError(f"vLLM can't run {folder} with `engine_options: {options}`: {one_line(error)}") from error
    finally:
        torch.set_num_threads = set_num_threads  # its CPU worker puts a function there that does nothing
    from vllm.distributed import cleanup_dist_env_and_memory  # noqa: PLC0415
    from vllm.v1.engine.exceptions import EngineDeadError  # noqa: PLC0415

    try:
        yield llm
    except EngineDeadError as error:
        raise OpdError(f"vLLM's own process ended, perhaps for want of memory: {one_line(error)}") from error
    except (torch.OutOfMemoryError, RuntimeError) as error:  # workers' errors arrive as the latter
        if not any(words in str(error) for words in ("out of memory", "can't allocate memory")):
            raise
        raise OpdError(
            f"out of memory with vLLM and `engine_options: {options}`; lower max_num_batched_tokens, max_num_seqs or, "
            f"for what runs beside it, gpu_memory_utilization: {one_line(error)}"
        ) from error
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm.llm_engine
        cleanup_dist_env_and_memory()


def _load(folder: str, dtype: str, longest: int, pooling: bool, options: dict[str, Any]) -> Any:
    room = options.get("max_model_len")
    if isinstance(room, int) and 0 < room < longest:  # -1: as many as memory holds
        raise OpdError(
            f"`engine_options: max_model_len: {room}` is less than prompt and response take, up to {longest} tokens: vLLM "
            "would cut responses there; leave the key out, or lower rollouts.max_new_tokens"
        )
    try:
        from vllm import LLM  # noqa: PLC0415 - half a minute; nothing else needs it
        from vllm.config import PoolerConfig  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise OpdError("engine: vllm needs pip install 'offline-opd[vllm]'") from error
    if pooling:
        # The pooling entry point insists on a tokenizer, which it doesn't use.
        pooler = PoolerConfig(task="token_embed", tok_pooling_type="ALL", use_activation=False)
        task = {"runner": "pooling", "convert": "embed", "pooler_config": pooler}
    else:
        task = {
            "runner": "generate",
            "skip_tokenizer_init": True,
            "logits_processors": ["pipeline.infer.vllm_worker:Drawer"],
            "worker_extension_cls": "pipeline.infer.vllm_worker.Drawn",
            "async_scheduling": False,  # a step's draw needs to know how many came before
        }
    defaults = {
        "max_model_len": longest,
        "enforce_eager": True,  # seconds to open, not minutes
        "gpu_memory_utilization": 0.8,  # the head and its logits lie beside it
        **({} if torch.cuda.is_available() else CPU_DEFAULTS),
    }
    return LLM(
        model=folder,
        dtype=dtype,
        trust_remote_code=False,
        enable_prefix_caching=True,
        generation_config="vllm",  # no sampling parameters of the model's own
        seed=0,
        use_tqdm_on_load=False,
        **task,
        **(defaults | options),
    )


@torch.inference_mode()
def hidden_rows(
    llm: Any, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], device: torch.device
) -> Iterator[tuple[np.ndarray, list[torch.Tensor]]]:
    """What `score.score` reads, as `score.hidden_rows` gives it; starts that prompts share are computed once.

    Args:
        llm: a pooling engine.
        prompts, responses: token ids, row by row; a response may be empty, a prompt not.
        device: where the head lies.
    """
    inputs = [np.concatenate([p, r]) for p, r in zip(prompts, responses, strict=True)]
    llm.reset_prefix_cache()  # what was computed for earlier calls would be missing from the result
    width = 4 * llm.model_config.get_hidden_size()
    for batch in batches([len(row) for row in inputs], HIDDEN_BYTES // width):
        hidden = _encode(llm, [inputs[i] for i in batch], reuse=True)
        # It leaves out what it found in its cache. That may be more than the prompt, where responses start alike.
        wanted = [len(responses[i]) + 1 for i in batch]
        short = [j for j, rows in enumerate(hidden) if len(rows) < wanted[j]]
        for j, rows in zip(short, _encode(llm, [inputs[batch[j]] for j in short], reuse=False), strict=True):
            hidden[j] = rows
        # Float32, but the values are of the model's dtype, which the head wants.
        yield (
            batch,
            [rows[-n:].to(device, llm.model_config.dtype) for rows, n in zip(hidden, wanted, strict=True)],
        )


def _encode(llm: Any, inputs: Sequence[np.ndarray], reuse: bool) -> list[torch.Tensor]:
    from vllm import PoolingParams  # noqa: PLC0415

    if not inputs:
        return []
    outputs = llm.encode(
        [{"prompt_token_ids": row.tolist()} for row in inputs],
        pooling_params=PoolingParams(use_activation=False, skip_reading_prefix_cache=not reuse),
        pooling_task="token_embed",
        use_tqdm=False,
    )
    return [output.outputs.data for output in outputs]


def sample(
    llm: Any,
    prompts: Sequence[np.ndarray],
    seeds: Sequence[int],
    stop: np.ndarray,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Response]:
    """Sample one response per prompt with a generating engine; as `sample.sample`, but vLLM makes the batches."""
    from vllm import SamplingParams  # noqa: PLC0415

    keys = [next(_keys) for _ in prompts]
    rules = {"steps": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "stop": stop.tolist()}
    outputs = llm.generate(
        [{"prompt_token_ids": row.tolist()} for row in prompts],
        [
            SamplingParams(
                temperature=0,  # takes the one id that `Drawer` leaves
                max_tokens=max_new_tokens,
                stop_token_ids=stop.tolist(),
                ignore_eos=True,  # only `stop` stops
                detokenize=False,
                extra_args={"draw": {"key": key, "seed": seed, **rules}},
            )
            for key, seed in zip(keys, seeds, strict=True)
        ],
        use_tqdm=False,
    )
    # Of several workers all those that see logits draw the same.
    drawn = next(found for found in llm.collective_rpc("take_drawn", args=(keys,)) if found)
    responses = []
    for output, (logps, top_id) in zip(outputs, drawn, strict=True):
        done = output.outputs[0]
        ids = np.array(done.token_ids, np.int32)  # with the stop id
        behavior, sampler = np.frombuffer(logps, np.float32).reshape(2, max_new_tokens)[:, : len(ids)]
        likeliest = np.frombuffer(top_id, np.int32).reshape(max_new_tokens, top_k)[: len(ids)]
        responses.append(Response(ids, behavior, sampler, likeliest, done.finish_reason == "stop"))
    advance(len(responses))
    return responses
