"""What can't be done with a model, as its config.json alone tells."""

from typing import Any, Literal

from pipeline.models import context, embedded
from schemas.config import Config
from schemas.errors import OpdError


def check_limits(config: Config, role: Literal["student", "teacher"], values: dict[str, Any]) -> None:
    """Refuse what the config wants of a model that can't be.

    Args:
        values: the model's config.json.
    Raises:
        OpdError: responses fill its context, or more of its ids are to be recorded than there are.
    """
    name = getattr(config, role).model
    longest, room = config.rollouts.longest, context(values)
    if room is not None and longest >= room:
        raise OpdError(
            f"`rollouts.max_new_tokens: {longest}` leaves no room for a prompt in the context of {role}.model {name}, which "
            f"is {room} tokens; lower it"
        )
    ids, top_k = embedded(values), config.rollouts.top_k
    if role == "student" and ids is not None and top_k > ids:
        raise OpdError(
            f"`rollouts.top_k: {top_k}` is more than the vocabulary of student.model {name} has, which is {ids} ids; lower it"
        )
