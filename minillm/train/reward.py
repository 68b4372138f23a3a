"""A reward of the task, by a function of the user's."""

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

from accelerate.utils import gather_object

from minillm.config.schema import ConfigError
from minillm.data.examples import Example
from minillm.model.sampling import decode
from minillm.train.context import Context

Reward = Callable[..., Sequence[float]]


def load_reward(path: str) -> Reward:
    """The function that objective.reward names.

    Args:
        path: package.module:function, imported as Python would here.

    Returns the function, to be called with the keywords prompts, responses and records.

    Raises ConfigError where it cannot be imported.

    Example:
        >>> from minillm.train.reward import load_reward
        >>> load_reward("math:sqrt")(9.0)
        3.0
    """
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module of the user's fails as it likes
        raise ConfigError(
            f"objective.reward {path} cannot be imported ({type(error).__name__}: {error}): name "
            "package.module:function "
            "of a module that `python -c 'import package.module'` finds"
        ) from error
    if not callable(found):
        raise ConfigError(f"objective.reward {path} is {type(found).__name__}; expected a function")
    return found


def rewards_of(
    reward: Reward, context: Context, examples: Sequence[Example], responses: list[list[int]]
) -> list[float]:
    """One number for each response; the processes share the calls, and all of them know the result.

    Raises ConfigError, in every process, for a function that fails or returns anything else.
    """
    name, numbers = context.config.objective.reward, context.mine(list(range(len(examples))))
    values, wrong = [], ""
    try:
        found: Any = reward(
            prompts=[examples[i].record.prompt for i in numbers],
            responses=decode(context.tokenizer, [responses[i] for i in numbers]),
            records=[examples[i].record for i in numbers],
        )
        values = [float(value) for value in found]
    except Exception as error:  # the others must not wait for this process
        wrong = (
            f"objective.reward {name} failed ({type(error).__name__}: {error}): it is called with prompts, "
            "responses and records, lists of one length, and returns a number for each response"
        )
    if not wrong and (len(values) != len(numbers) or not all(map(math.isfinite, values))):
        wrong = (
            f"objective.reward {name} returned {values[:5]} for {len(numbers)} responses; expected a finite number "
            "for each of them"
        )
    shares = gather_object([(wrong, list(zip(numbers, values, strict=False)))])
    if told := next((found for found, _ in shares if found), ""):
        raise ConfigError(told)
    return [value for _, value in sorted(pair for _, pairs in shares for pair in pairs)]
