"""All that `minillm evaluate` measures of one model on one data set, as JSON.

Answers are decoded by minillm/model/sampling.py, which reads no generation_config: what decides them stands under
`generation`, all of it.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from torch import Tensor

from minillm.config.schema import ConfigError, RunConfig
from minillm.data.examples import Example
from minillm.evaluate.buckets import by_length
from minillm.evaluate.calibration import next_token, options
from minillm.evaluate.divergence import references
from minillm.evaluate.diversity import distinct
from minillm.evaluate.exposure import excess_accumulated_error
from minillm.evaluate.means import Estimate
from minillm.evaluate.rouge import exact_match, rouge_l
from minillm.evaluate.samples import Samples, draw
from minillm.model.check import check_context
from minillm.model.head import CausalLM
from minillm.model.sampling import decode, greedy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULTS = {"prompts": 0, "samples": 5, "sample_tokens": 256, "greedy_tokens": 256}
"""Of section `eval`, for the command: all prompts, the paper's five seeds and 256 tokens."""
SCORES = {"rouge_l": rouge_l, "exact_match": exact_match}


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
        "generation_config": "not read",
    }


def measure(
    student: CausalLM,
    teacher: CausalLM | None,
    tokenizer: "PreTrainedTokenizerBase",
    examples: Sequence[Example],
    config: RunConfig,
) -> dict[str, Any]:
    """`measure_answers`, the loss and calibration; with a teacher also both KL divergences and exposure bias.

    Raises ConfigError for a temperature other than 1 with a teacher, or sequences beyond the models' positions.
    """
    settings = config.eval
    if teacher is not None and settings.temperature != 1:
        raise ConfigError(
            f"eval.temperature is {settings.temperature}; the divergences and ExAccErr are defined at 1: set it to 1, "
            "or leave --teacher away"
        )
    if teacher is not None:
        _check_context(teacher, examples, config)
    result, drawn = _answers(student, teacher, tokenizer, examples, config)
    seconds = result["seconds"]
    with _timed(seconds, "calibration"):
        calibrated, loss = next_token(student, examples, settings)
        result["calibration"] = {"next_token": calibrated, "options": options(student, tokenizer, examples, settings)}
        result["loss"] = loss.to_dict()
    if teacher is not None:
        result |= _against_teacher(student, teacher, examples, config, drawn, tokenizer.eos_token_id, seconds)
    return _defined(result)


def measure_answers(
    model: CausalLM, tokenizer: "PreTrainedTokenizerBase", examples: Sequence[Example], config: RunConfig
) -> dict[str, Any]:
    """Scores of sampled answers alone against the references, their diversity and lengths."""
    return _defined(_answers(model, None, tokenizer, examples, config, with_greedy=False)[0])


def _answers(
    student: CausalLM,
    teacher: CausalLM | None,
    tokenizer: "PreTrainedTokenizerBase",
    examples: Sequence[Example],
    config: RunConfig,
    with_greedy: bool = True,
) -> tuple[dict[str, Any], Samples]:
    """The samples are drawn with the teacher looking on, where there is one."""
    settings, eos = config.eval, tokenizer.eos_token_id
    _check_context(student, examples, config)
    seconds: dict[str, float] = {}
    result: dict[str, Any] = {"prompts": len(examples), "generation": generation(config, tokenizer)}
    given = [example.record.references for example in examples]
    lengths = [len(tokenizer.encode(texts[0], add_special_tokens=False)) for texts in given]
    ids: dict[str, list[list[int]]] = {}
    if with_greedy:
        with _timed(seconds, "greedy"):
            prompts = [example.prompt for example in examples]
            ids["greedy"] = greedy(student, prompts, settings.greedy_tokens, settings.batch_size, eos)
        result["tokens_per_second"] = sum(map(len, ids["greedy"])) / seconds["greedy"]
    with _timed(seconds, "sampled"):
        drawn = draw(student, teacher, examples, settings, eos)
    ids["sampled"] = drawn.token_ids
    answers = {way: decode(tokenizer, found) for way, found in ids.items()}
    by_seed = [answers["sampled"][s :: settings.samples] for s in range(settings.samples)]

    # ---- against the reference answers
    named: dict[str, Estimate] = {}
    with _timed(seconds, "scores"):
        for name, score in SCORES.items():
            seeds = [score(texts, given) for texts in by_seed]
            pooled = Estimate(sum(e.totals for e in seeds), sum(e.counts for e in seeds))  # type: ignore[arg-type]
            named[f"{name}/sampled"] = pooled
            result[name] = {"sampled": {**pooled.to_dict(), **over_seeds([e.mean for e in seeds])}}
            if with_greedy:
                named[f"{name}/greedy"] = score(answers["greedy"], given)
                result[name]["greedy"] = named[f"{name}/greedy"].to_dict()
    result["by_reference_length"] = by_length(lengths, named)

    # ---- of the text itself
    result["distinct"] = {str(n): over_seeds([distinct(texts, n) for texts in by_seed]) for n in (1, 2, 3, 4)}
    limits = {"greedy": settings.greedy_tokens, "sampled": settings.sample_tokens}
    result["length"] = {way: _lengths([len(tokens) for tokens in found], limits[way]) for way, found in ids.items()}
    result["length"]["references"] = fmean(lengths)
    shown = answers.get("greedy", by_seed[0])
    result["samples"] = [
        {"prompt": e.record.prompt, "references": e.record.references, "answer": a, "sampled": by_seed[0][i]}
        for i, (e, a) in enumerate(zip(examples[: config.log.samples], shown, strict=False))
    ]
    return {**result, "seconds": seconds}, drawn


def _against_teacher(
    student: CausalLM,
    teacher: CausalLM,
    examples: Sequence[Example],
    config: RunConfig,
    drawn: Samples,
    eos_token_id: int,
    seconds: dict[str, float],
) -> dict[str, Any]:
    with _timed(seconds, "teacher's samples"):
        taught = draw(teacher, student, examples, config.eval, eos_token_id)
    with _timed(seconds, "references"):
        reverse, forward = references(student, teacher, examples, config.eval)

    def per_prompt(values: Tensor) -> Tensor:
        return values.unflatten(0, (-1, config.eval.samples))

    return {
        "reverse_kl": {"own_samples": drawn.mean(drawn.to_other).to_dict(), "references": reverse.to_dict()},
        "forward_kl": {"teacher_samples": taught.mean(taught.to_other).to_dict(), "references": forward.to_dict()},
        "exposure_bias": excess_accumulated_error(
            *(per_prompt(x) for x in (drawn.from_other, taught.to_other, drawn.lengths, taught.lengths))
        ),
    }


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of sampling (0 of a single one), and each seed's value."""
    defined = not any(map(math.isnan, values))
    return {
        "mean": fmean(values),
        "standard_deviation": (stdev(values) if len(values) > 1 else 0.0) if defined else math.nan,
        "by_seed": list(values),
    }


def _check_context(model: CausalLM, examples: Sequence[Example], config: RunConfig) -> None:
    new_tokens = max(config.eval.sample_tokens, config.eval.greedy_tokens, *(len(e.response) for e in examples))
    check_context(model.model, max(len(example.prompt) for example in examples) + new_tokens)


def _lengths(tokens: Sequence[int], limit: int) -> dict[str, float]:
    """Mean length in tokens, end-of-sequence included, and the share that the limit cut."""
    return {"mean": fmean(tokens), "at_limit": sum(n == limit for n in tokens) / len(tokens)}


def _defined(tree: Any) -> Any:
    """NaN, such as the standard error of one prompt, as the None that JSON knows."""
    if isinstance(tree, dict):
        return {key: _defined(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_defined(value) for value in tree]
    return None if isinstance(tree, float) and math.isnan(tree) else tree


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - started, 3)
