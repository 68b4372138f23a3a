"""Several teachers, each for the records that name it."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from minillm.config.schema import Route, StageConfig
from minillm.model.head import CausalLM

if TYPE_CHECKING:
    from minillm.data.examples import Example


class Routed(nn.Module):
    """Teachers by name; none of them is the teacher of all records.

    Args:
        teachers: the models.
        routes: of each name, how much its divergence weighs and which one it is.
    """

    def __init__(self, teachers: Mapping[str, CausalLM], routes: Mapping[str, Route]) -> None:
        super().__init__()
        self.teachers, self.routes = nn.ModuleDict(dict(teachers)), dict(routes)

    def stage(self, name: str, stage: StageConfig) -> StageConfig:
        """The stage as it is for the records of one teacher."""
        route, loss = self.routes[name], stage.loss
        loss = dataclasses.replace(
            loss,
            divergence=route.divergence or loss.divergence,
            beta=loss.beta if route.beta is None else route.beta,
            distill_weight=loss.distill_weight * route.weight,
        )
        return dataclasses.replace(stage, loss=loss)


def by_name(examples: "list[Example]") -> "dict[str, list[Example]]":
    """The examples of each teacher that is named, in the order in which they come."""
    found: dict[str, list[Example]] = {}
    for example in examples:
        found.setdefault(example.record.teacher, []).append(example)
    return found
