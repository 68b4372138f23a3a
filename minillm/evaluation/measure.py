"""`measure`, the one evaluation: of a run around its stages, of `minillm evaluate` and of a study.

Responses are decoded by minillm/model/sampling.py or an engine (eval.engine). No generation_config is read: all
settings that decide what is decoded stand under `generation` in the result.
"""

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minillm.config.schema import ConfigError, DataConfig, EvalConfig, RunConfig
from minillm.data.examples import DataError, Example, encode, read_records
from minillm.engine import Engine
from minillm.engine.pair import Draw, draw_everywhere, engine_of
from minillm.evaluation import calibration, text
from minillm.evaluation.divergence import Author, Samples, draw, references
from minillm.evaluation.exposure import ExposureBias, excess_accumulated_error
from minillm.evaluation.means import Mean, Seeds
from minillm.evaluation.result import OWN, REFERENCES, Evaluation, Length, Responses
from minillm.evaluation.share import a_share, over_batches
from minillm.model.check import check_context
from minillm.model.head import CausalLM, Scorer, share_vocabulary
from minillm.model.sampling import Decoding, decode, greedy
from minillm.teacher.choose import ends_of
from minillm.teacher.served import ServedTeacher
from minillm.teacher.stored import StoredTeacher
from minillm.teacher.vllm_server import VllmTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTS = ("greedy", "samples", "references", "teacher_samples", "calibration")
"""What can be measured, by the text that it needs.

greedy: scores, lengths and speed of greedy responses. samples: scores, lengths and diversity of sampled responses;
with a teacher also the reverse KL along them. references: both KL divergences along the references. teacher_samples:
the forward KL along samples of the teacher and, together with `samples`, exposure bias. calibration: calibration, and
the loss on references. What compares with a teacher is left out where there is none.
"""
DEFAULTS = {"prompts": 0, "samples": 5, "sample_tokens": 256, "greedy_tokens": 256}
"""Of the section `eval` outside a run: all prompts, and the five seeds and 256 tokens of the paper."""
SCORES = {"rouge_l": text.rouge_l, "exact_match": text.exact_match}


def evaluation_set(config: RunConfig, tokenizer: "PreTrainedTokenizerBase", seen: Sequence[str] = ()) -> list[Example]:
    """`eval.prompts` prompts (0: all) with references from data.eval, chosen by eval.seed. Prompts of the
    sources `seen`, which the model was trained or validated on, are left out.

    Raises DataError when too few are left.
    """
    source = config.data.eval
    limits = DataConfig(
        max_prompt_length=config.eval.max_prompt_length,
        max_response_length=config.eval.max_reference_length,
        overlong_prompts="drop",
        overlong_answers=config.eval.overlong_references,
    )
    seen_prompts = {record.prompt for name in set(seen) for record in read_records(name)}
    examples = [
        example
        for example in encode(read_records(source), tokenizer, config.data, limits, source).examples
        if example.response and example.record.prompt not in seen_prompts
    ]
    if len(examples) < max(1, config.eval.prompts):
        raise DataError(
            f"{config.data.eval} has {len(examples)} held-out prompts of at most {config.eval.max_prompt_length} "
            f"tokens with a reference; eval.prompts asks for {config.eval.prompts or 'all'}"
        )
    return random.Random(config.eval.seed).sample(examples, config.eval.prompts or len(examples))


def measure(
    student: Author,
    teacher: Scorer | None,
    tokenizer: "PreTrainedTokenizerBase",
    examples: Sequence[Example],
    config: RunConfig,
    parts: Sequence[str] = PARTS,
) -> Evaluation:
    """Evaluate `student` on `examples` by the section `eval` of `config`; `parts` are names of `PARTS`.

    The uniforms that samples are drawn from are the same in every call: evaluations are paired. The processes of a
    run share the work, and all of them return the same. Of heads of different size, the common columns are measured,
    in every part (`share_vocabulary`). Both models may be on a server. What a teacher cannot say is left out
    (`left_out`).

    Raises ConfigError for a temperature other than 1 with a teacher, or sequences beyond the models' positions;
    DataError for references that a stored teacher was not asked about.
    """
    settings, ends = config.eval, ends_of(tokenizer, config.data, (student, teacher))
    check_measurable(student, teacher, examples, config)
    if teacher is not None:
        share_vocabulary(student, teacher)
    if settings.engine != "builtin":
        for part, lm in {"greedy": student, "samples": student, "teacher_samples": teacher}.items():
            if isinstance(lm, CausalLM) and part in parts:
                engine_of(lm, config.engine)  # before any work that could be lost

    def engine(lm: Author) -> Engine | None:
        return engine_of(lm, config.engine) if settings.engine != "builtin" and isinstance(lm, CausalLM) else None

    judge = None if isinstance(teacher, StoredTeacher) else teacher
    seconds: dict[str, float] = {}
    means: dict[str, Mean] = {}
    token_ids: dict[str, list[list[int]]] = {}
    drawn, bias = None, None

    if "greedy" in parts:
        with _timed(seconds, "greedy"):
            token_ids["greedy"] = _greedy(student, examples, settings, ends, engine(student))
    if "samples" in parts:
        with _timed(seconds, "sampled"):
            drawn = draw(student, judge, examples, settings, ends, engine(student))
            token_ids["sampled"] = drawn.token_ids
    responses = {way: decode(tokenizer, found) for way, found in token_ids.items()}
    with _timed(seconds, "scores"):
        means |= _scores(responses, [example.record.references for example in examples], settings.samples)
    lengths = [len(tokenizer.encode(e.record.references[0], add_special_tokens=False)) for e in examples]
    by_reference_length = text.by_length(lengths, means) if means else {}

    calibrated = {}
    if "calibration" in parts:
        with _timed(seconds, "calibration"):
            calibrated["next_token"], means["loss"] = calibration.next_token(student, examples, settings)
            if options := calibration.options(student, tokenizer, examples, settings):
                calibrated["options"] = options
    if teacher is not None:
        if drawn and judge is not None:
            means[OWN] = drawn.per_token(drawn.to_other)
        if "references" in parts:
            with _timed(seconds, "references"):
                means[REFERENCES], means["forward_kl/references"] = references(student, teacher, examples, settings)
        if "teacher_samples" in parts and isinstance(teacher, Author):
            with _timed(seconds, "teacher's samples"):
                taught = draw(teacher, student, examples, settings, ends, engine(teacher))
            means["forward_kl/teacher_samples"] = taught.per_token(taught.to_other)
            bias = _exposure_bias(drawn, taught) if drawn else None

    return Evaluation(
        prompts=len(examples),
        generation=generation(config, tokenizer),
        means=means,
        by_reference_length=by_reference_length,
        distinct=_distinct(_by_seed(responses["sampled"], settings.samples)) if drawn else {},
        length={way: _length(found, _limits(config)[way]) for way, found in token_ids.items()},
        reference_length=fmean(lengths),
        calibration=calibrated,
        exposure_bias=bias,
        tokens_per_second=sum(map(len, token_ids["greedy"])) / seconds["greedy"] if "greedy" in parts else None,
        responses=_shown(examples[: config.log.samples], responses, settings.samples),
        seconds=seconds,
    )


def generation(config: RunConfig, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Everything that decides what is decoded, beside model and prompts."""
    settings = config.eval
    return {
        "prompt_template": config.data.prompt_template,
        "max_prompt_length": settings.max_prompt_length,
        "greedy": {"max_new_tokens": settings.greedy_tokens},
        "sampled": {
            "temperature": settings.temperature,
            "top_k": 0,
            "top_p": 1.0,
            "max_new_tokens": settings.sample_tokens,
            "seeds": list(range(settings.seed, settings.seed + settings.samples)),
        },
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "stops_at": tokenizer.eos_token,
        "batch_size": settings.batch_size,
        "engine": settings.engine,
        "generation_config": "not read",
    }


def left_out(teacher: Scorer | None, parts: Sequence[str]) -> str:
    """What of these parts this teacher cannot say, in words; empty where it can say all."""
    own, taught = (
        "the reverse KL on the student's own samples",
        "the forward KL on the teacher's samples, exposure bias",
    )
    if isinstance(teacher, StoredTeacher) and {"samples", "teacher_samples"} & set(parts):
        return (
            f"not measured: {own}, {taught}. {teacher.folder} holds what the teacher said of given texts: name the "
            "model itself for these, or a server of `minillm teach`"
        )
    if isinstance(teacher, VllmTeacher) and "teacher_samples" in parts:
        return (
            f"not measured: {taught}. vLLM gives the teacher's hidden states and draws nothing here: name the model "
            "itself for these, or a server of `minillm teach`"
        )
    return ""


def check_measurable(student: Author, teacher: Scorer | None, examples: Sequence[Example], config: RunConfig) -> None:
    if teacher is not None and config.eval.temperature != 1:
        raise ConfigError(
            f"eval.temperature is {config.eval.temperature}; the divergences and ExAccErr are defined at 1: set it to "
            "1, or evaluate without a teacher"
        )
    new_tokens = max(*_limits(config).values(), *(len(example.response) for example in examples))
    tokens = max(len(example.prompt) for example in examples) + new_tokens
    for model in (student, teacher):
        if isinstance(model, CausalLM):
            check_context(model.model, tokens)
        elif isinstance(model, ServedTeacher | VllmTeacher):
            model.check(tokens, max(max(example.prompt + example.response) for example in examples))
        elif isinstance(model, StoredTeacher):
            assert model.head  # or it says what it holds instead
            model.check_held(examples)


def _limits(config: RunConfig) -> dict[str, int]:
    return {"greedy": config.eval.greedy_tokens, "sampled": config.eval.sample_tokens}


def _greedy(
    student: Author, examples: Sequence[Example], settings: EvalConfig, ends: Sequence[int], engine: Engine | None
) -> list[list[int]]:
    if engine is not None:
        assert isinstance(student, CausalLM)
        how = Draw(student, None, 0.0, Decoding(settings.greedy_tokens, ends, temperature=0.0), student.vocab_size)
        return [each.token_ids for each in draw_everywhere(how, engine, [example.prompt for example in examples])]

    def respond(start: int, part: Sequence[Example]) -> list[list[int]]:
        prompts, limit = [example.prompt for example in part], settings.greedy_tokens
        if isinstance(student, CausalLM):
            return greedy(student, prompts, limit, settings.batch_size, ends)
        unread = torch.zeros(limit, len(part), 2)
        return student.sample(prompts, Decoding(limit, ends, temperature=0.0), unread, student.vocab_size)

    size = settings.batch_size
    if isinstance(student, CausalLM):  # which refills its places
        size = a_share(examples, size)
    return [tokens for part in over_batches(respond, examples, size, student) for tokens in part]


def _by_seed(sampled: list[str], samples: int) -> list[list[str]]:
    """The samples of one prompt are neighbours."""
    return [sampled[seed::samples] for seed in range(samples)]


def _scores(responses: dict[str, list[str]], given: text.References, samples: int) -> dict[str, Mean]:
    means = {}
    for name, score in SCORES.items():
        if "greedy" in responses:
            means[f"{name}/greedy"] = score(responses["greedy"], given)
        if "sampled" in responses:
            by_seed = [score(texts, given) for texts in _by_seed(responses["sampled"], samples)]
            means[f"{name}/sampled"] = Mean.over_seeds(by_seed)
    return means


def _distinct(by_seed: list[list[str]]) -> dict[str, Seeds]:
    return {str(n): Seeds(tuple(text.distinct(texts, n) for texts in by_seed)) for n in (1, 2, 3, 4)}


def _length(token_ids: list[list[int]], limit: int) -> Length:
    lengths = [len(tokens) for tokens in token_ids]
    return Length(fmean(lengths), sum(n == limit for n in lengths) / len(lengths))


def _exposure_bias(drawn: Samples, taught: Samples) -> ExposureBias:
    def per_prompt(values: Tensor) -> Tensor:
        return values.unflatten(0, (-1, drawn.per_prompt))

    tables = (drawn.from_other, taught.to_other, drawn.lengths, taught.lengths)
    return excess_accumulated_error(*map(per_prompt, tables))


def _shown(examples: Sequence[Example], responses: dict[str, list[str]], samples: int) -> tuple[Responses, ...]:
    nothing = [None] * len(examples)
    greedy, sampled = responses.get("greedy", nothing), responses.get("sampled", nothing * samples)[::samples]
    shown = [
        Responses(example.record.prompt, tuple(example.record.references), *found)
        for example, *found in zip(examples, greedy, sampled, strict=False)
    ]
    return tuple(shown) if responses else ()


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - started, 3)
