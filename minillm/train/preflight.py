"""What can be known to go wrong is found here, before the first step: the data is read, and tried on the models."""

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, gather_object

from minillm.config.check import MOVING
from minillm.config.recipe import Recipe
from minillm.config.schema import ConfigError, RunConfig, StageConfig
from minillm.config.teacher import is_stored
from minillm.data.examples import Example, chunk_text, encode, read_records, read_text
from minillm.data.records import every_turn
from minillm.data.sources import DataError
from minillm.model.adapters import keep_base_in
from minillm.model.check import (
    check_blocks,
    check_context,
    check_decoding,
    check_forward,
    check_ids,
    check_packing,
    check_training,
)
from minillm.model.head import CausalLM
from minillm.model.static import check_graphs
from minillm.parallel.mesh import processes_of_a_host, refuse_wrappers
from minillm.parallel.shard import is_sharded
from minillm.run.trackers import check_trackers
from minillm.teacher import Teacher
from minillm.teacher.choose import Elsewhere, ends_of
from minillm.teacher.routed import Routed
from minillm.teacher.served import ServedTeacher
from minillm.teacher.stored import StoredTeacher
from minillm.teacher.vllm_server import VllmTeacher
from minillm.train.context import Context, compute_dtype
from minillm.train.optimizers import find_optimizer
from minillm.train.reward import load_reward
from minillm.train.selection import split_validation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prepare(
    run: RunConfig,
    config: StageConfig,
    student: CausalLM,
    teacher: Teacher | Routed | None,
    tokenizer: "PreTrainedTokenizerBase",
) -> Context:
    """Read the data and check it against the models, before any work that could be lost."""
    routed, teacher = (teacher, None) if isinstance(teacher, Routed) else (None, teacher)
    teachers: list[Any] = [teacher] if routed is None else list(routed.teachers.values())
    refuse_wrappers()
    accelerator = Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1)
    )  # not the environment's
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ConfigError(
            f"{accelerator.distributed_type} of accelerate shards the student, which its losses do not survive: "
            "launch without it (accelerate launch --num_processes N, or torchrun), and set parallel.student to shard"
        )
    processes_of_a_host(run.parallel)
    if run.parallel.student == "shard" and compute_dtype(run, accelerator) == torch.float16:
        raise ConfigError(
            "parallel.student shard does not compute in float16, whose loss scaling does not know shards: launch "
            "without --mixed_precision fp16, or set model.compute_dtype to bfloat16"
        )
    check_trackers(run.log.trackers)
    find_optimizer(config.optim)
    torch.manual_seed(run.seed)
    for key in ("optim.batch_size", "rollout.batch_size", "objective.pt_batch_size"):
        section, name = key.split(".")
        size = getattr(getattr(config, section), name)
        if size % accelerator.num_processes:
            raise ConfigError(f"{key} is {size}, which {accelerator.num_processes} processes cannot share equally")
    if config.method == "minillm" and config.objective.reward:
        load_reward(config.objective.reward)
    samples = config.method in ("minillm", "seqkd")  # learn from what is sampled: any prompt will do
    records = read_records(config.data.train)
    if config.data.rollout_turns == "all" and config.method in ("minillm", "seqkd", "gkd"):
        records = [turn for record in records for turn in every_turn(record)]
    encoded = encode(
        records,
        tokenizer,
        run.data,
        config.data,
        config.data.train,
        answers=not samples,
    )
    examples, about = encoded.examples, str(encoded)
    validation: list[Example] = []
    if 0 < config.validation.every < config.optim.steps:
        examples, validation = split_validation(run, config, encoded, tokenizer)
        about += f"; {len(examples)} to train on, {len(validation)} for validation"
    wants_text = config.method == "minillm" and config.objective.pt_weight > 0
    text = chunk_text(read_text(config.data.text), tokenizer, config.objective.pt_length) if wants_text else []
    if text:
        about += f"; {len(text)} chunks of text"
    for model in teachers if run.teacher.source not in MOVING else ():
        if isinstance(model, CausalLM):
            model.requires_grad_(False)
    check_teachers(run, config, [*examples, *validation], routed)
    sequences = (e.prompt + e.prompt_of_teacher + e.response for e in (*examples, *validation))
    largest = max(max(ids) for ids in (*sequences, *text) if ids)
    told = max((len(e.teacher_prompt) for e in (*examples, *validation) if e.teacher_prompt is not None), default=0)
    more = max(0, told - config.data.max_prompt_length)
    if isinstance(teacher, Elsewhere):
        teacher.to(accelerator.device)
    if isinstance(teacher, StoredTeacher) and config.method == "kd":
        teacher.check((*examples, *validation), config.loss, min(student.vocab_size, teacher.vocab_size))
    if isinstance(teacher, ServedTeacher):
        takes_turns = config.method == "minillm" and config.rollout.alpha > 0
        teacher.check(longest(config, validates=bool(validation)) + more, largest, takes_turns)
    if isinstance(teacher, VllmTeacher):
        teacher.check(longest(config, validates=bool(validation)) + more, largest)
    for model in (student, *teachers):
        if isinstance(model, CausalLM):
            length = longest(config, validates=bool(validation)) + more * (model is not student)
            check_context(model.model, length)
            check_ids(model.model, largest, config.data.train)
            if not is_sharded(model):
                model.to(accelerator.device)
            check_forward(model.model)
            if config.data.packing:
                check_packing(model.model)
    keep_base_in(student.model, compute_dtype(run, accelerator))
    check_training(student)
    ends = ends_of(tokenizer, run.data, (student, *teachers))
    if config.method in ("minillm", "seqkd", "gkd"):
        about += f"; a response ends at {' or '.join(map(repr, tokenizer.convert_ids_to_tokens(list(ends))))}"
    samplers = {"minillm": (student, teacher), "gkd": (student,), "seqkd": (teacher,)}.get(config.method, ())
    for model in samplers:
        if isinstance(model, CausalLM):
            check_decoding(model, longest(config, validates=bool(validation)))
    if config.rollout.cuda_graphs is True:
        beside = config.rollout.alpha > 0 and config.rollout.coins == "row"
        needed = samplers if config.method != "minillm" or beside else (student,)
        check_cuda_graphs(*(model for model in needed if isinstance(model, CausalLM)))
    found = Context(
        run, config, accelerator, student, teacher, tokenizer, examples, validation, text, about, routed=routed
    )
    if config.rollout.engine != "builtin":
        if config.rollout.overlap and accelerator.num_processes > 1:
            raise ConfigError(
                f"rollout.overlap with rollout.engine {config.rollout.engine} samples in a thread, where "
                f"{accelerator.num_processes} processes cannot tell each other of a server that is lost: set it to 0"
            )
        for model in samplers:
            if model is not None and (model is not teacher or config.method == "seqkd" or config.rollout.alpha > 0):
                if not isinstance(model, CausalLM):
                    raise ConfigError(
                        f"rollout.engine is {config.rollout.engine}, and the teacher {run.model.teacher} is no model "
                        "that an engine could draw from: set rollout.engine to builtin, or model.teacher to a model"
                    )
                found.engine(model)
    if config.method == "minillm" and config.rollout.coins != "row" and isinstance(teacher, CausalLM):
        check_blocks(teacher)
    return found


def check_teachers(run: RunConfig, config: StageConfig, examples: Sequence[Example], routed: Routed | None) -> None:
    """Refuse examples that no teacher teaches, or that it could not teach anything.

    Raises ConfigError, or DataError which names the record.
    """
    told = [example for example in examples if example.teacher_prompt is not None]
    if told and config.method == "minillm" and config.rollout.alpha > 0:
        raise ConfigError(
            f"{told[0].record.where}: the teacher reads another prompt than the student, and rollout.alpha "
            f"{config.rollout.alpha} would let it write part of the responses: set rollout.alpha to 0"
        )
    if told and is_stored(run.model.teacher):
        raise ConfigError(
            f"{told[0].record.where}: the teacher reads another prompt than the student, and {run.model.teacher} "
            "holds what it said behind the student's: name the teacher itself in model.teacher"
        )
    if run.teacher.source == "student" and len(told) < len(examples) and config.method in ("kd", "gkd"):
        raise ConfigError(
            "teacher.source is student, and teacher and student read the same prompt: their divergence is 0. Give the "
            "records a `teacher_prompt`, set data.teacher_template, or take teacher.source ema or base"
        )
    if routed is not None and config.method in ("kd", "gkd"):
        for example in examples:
            if example.record.teacher not in routed.teachers:
                raise DataError(
                    f"{example.record.where}: `teacher` is {example.record.teacher!r}; expected one of "
                    f"{', '.join(routed.teachers)}, the names in the section teachers"
                )


def check_cuda_graphs(*models: CausalLM) -> None:
    """Refuse rollout.cuda_graphs: true where the step of one of these models cannot be held by a graph."""
    for lm in models:
        if lm.device.type != "cuda":
            raise ConfigError(
                f"rollout.cuda_graphs is true, and {type(lm.model).__name__} is on the {lm.device.type}: only a CUDA "
                "device has graphs. Set it to auto"
            )
    check_graphs(*models)


def longest(config: StageConfig, validates: bool) -> int:
    """Tokens of the longest sequence that a stage can make a model read."""
    data, method = config.data, config.method
    responses = [config.rollout.longest] if method in ("minillm", "seqkd", "gkd") else []
    responses += [data.max_response_length] if method in ("sft", "kd", "gkd") else []
    if validates:
        responses += [config.validation.greedy_tokens if method == "minillm" else data.max_response_length]
    text = config.objective.pt_length if method == "minillm" and config.objective.pt_weight > 0 else 0
    return max(data.max_prompt_length + max(responses), text)


def check_same_everywhere(recipe: Recipe, trainings: Mapping[str, Context], evaluated: Sequence[Example]) -> None:
    """Refuse processes that were given another recipe or other data than the first: they would train on as one, each
    on its own. Every process must call it.

    Raises ConfigError, in all of them.
    """
    accelerators = [training.accelerator for training in trainings.values()]
    if accelerators[0].num_processes == 1:
        return
    given = {"recipe": f"{recipe.digest()} {recipe.run.log} {recipe.run.parallel}", "data.eval": _digest(evaluated)}
    given |= {
        f"data of {name}": _digest(each.examples, each.validation, each.text) for name, each in trainings.items()
    }
    first, *others = gather_object([given])
    for number, other in enumerate(others, 1):
        for what in first.keys() | other.keys():
            if first.get(what) != other.get(what):
                raise ConfigError(
                    f"process {number} has another {what} than process 0: start all of them by the same command, on "
                    "the same files"
                )


def _digest(*data: Sequence[Example | list[int]]) -> str:
    """Of all tokens of examples and of chunks of text, in their order, and of what answers are scored against."""
    found = hashlib.sha256()
    for each in data:
        for item in each:
            parts = (item.prompt, item.prompt_of_teacher, item.response) if isinstance(item, Example) else (item,)
            for ids in parts:
                found.update(array("q", [len(ids), *ids]).tobytes())
            if isinstance(item, Example):
                found.update(repr(item.record.references).encode(errors="surrogatepass"))
        found.update(b"|")
    return found.hexdigest()


def space_needed(recipe: Recipe, student: "PreTrainedModel") -> int:
    """Bytes that a run writes at most: the checkpoints that are kept and the one that is being written, the best
    weights that they know of, and model/, which each stage replaces."""
    log = recipe.run.log
    weights = sum(p.nbytes for p in student.parameters() if p.requires_grad)
    checkpoints = log.checkpoints_kept + 1 if log.checkpoint_every else 1  # of a signal
    validated = sum(0 < stage.validation.every < stage.optim.steps for stage in recipe.stages.values())
    best = validated + checkpoints if validated else 0
    exports = min(len(recipe.stages), 2)
    return weights * (3 * checkpoints + best) + exports * sum(p.nbytes for p in student.parameters())
