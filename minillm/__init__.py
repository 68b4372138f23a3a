"""MiniLLM: distillation of language models by sequence-level reverse KL (arXiv 2306.08543).

`distill` trains a student, `evaluate` measures a model, `load_recipe` reads a recipe. Models and data are named as in
YAML: a directory or file, a hub id, or `package:NAME`. `import minillm` itself imports neither torch nor transformers.
"""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from minillm.config.recipe import Recipe
    from minillm.distillation import Run
    from minillm.evaluation.result import Evaluation

__all__ = ["distill", "evaluate", "load_recipe"]
__version__ = "0.1.0"

Source = str | PathLike[str]
"""A directory or file, a hub id, or `package:NAME`."""


def distill(
    recipe: "Recipe | Source | None" = None,
    *,
    teacher: Source | None = None,
    student: Source | None = None,
    train: Source | None = None,
    stages: Mapping[str, Any] | Sequence[str] | None = None,
    resume: str = "",
    **overrides: Any,
) -> "Run":
    """Train a student on its teacher, stage by stage, and evaluate it at the start and after each stage.

    It does what `minillm distill` does and prints the same lines. Without held-out prompts, `data={"eval": SOURCE}`,
    it trains and does not evaluate, as `minillm train` does.

    Args:
        recipe: a YAML file or a Recipe to start from; the other arguments are laid over it. None: they say everything.
        teacher: short for `model={"teacher": …}`.
        student: short for `model={"student": …}`. Instead of a student, `model={"drop_layers": [first, last]}` cuts
            one from the teacher.
        train: short for `data={"train": …}`: prompts, with answers for the methods that learn from answers.
        stages: the stages in order: by name, the sections that differ from `overrides`, as under `stages:` in YAML; or
            a list of methods, of sft, kd, seqkd, gkd and minillm. None: those of the recipe, else one of minillm.
        resume: "auto" goes on from the newest checkpoint of the last run of the same recipe, or starts if there is
            none; a path goes on from that checkpoint.
        **overrides: the sections and keys of minillm/config/schema.py, as `optim={"lr": 1e-5}`, `output="runs/mine"`
            or `seed=1`. The section `teacher` is written `**{"teacher.dtype": "bfloat16"}`.

    Returns:
        A Run: `model_path` (what `AutoModelForCausalLM.from_pretrained` loads), `evaluations` (one Evaluation per
        stage), `summary` (what summary.json holds) and `path` (the run directory).

    Raises:
        ConfigError, DataError, PackageError: a setting, a source, a package or a run directory that cannot be used;
            found before any work that could be lost.
        CheckpointError: a checkpoint that cannot be used, or something that could not be written; the message says
            how to go on.
        ServerLost: a server that samples or teaches no longer answers; everything up to that step is saved, and the
            message says how to go on.
        FileNotFoundError: no such recipe, or nothing to resume from.
        FloatingPointError: the loss is not finite.
        Interrupted: a signal asked to stop (SIGTERM, Ctrl-C); everything up to that step is saved, and the message
            says how to go on.

    Examples:
        The files here are a tiny teacher and student, and prompts with answers as JSON lines.

        >>> import minillm
        >>> run = minillm.distill(
        ...     teacher="teacher",
        ...     student="student",
        ...     train="train.jsonl",
        ...     data={"eval": "eval.jsonl"},
        ...     stages={"warm-up": {"method": "kd"}, "minillm": {"objective": {"pt_weight": 0}}},
        ...     optim={"steps": 2, "batch_size": 4},
        ...     rollout={"batch_size": 4, "max_new_tokens": 8},
        ...     eval={"prompts": 4},
        ...     output="runs/tiny",
        ... )
        teacher 0.0M parameters, 4 layers, ...
        >>> list(run.evaluations)
        ['start', 'warm-up', 'minillm', 'teacher']
        >>> run.evaluations["minillm"].means["reverse_kl/own_samples"].prompts
        4
        >>> run.model_path.as_posix()
        'runs/tiny/model'
    """
    from minillm.config.recipe import Recipe, load_recipe, merge, nested, recipe_from
    from minillm.config.schema import ConfigError
    from minillm.distillation import run_recipe
    from minillm.run.workers import first_process_tells

    tree = nested(_as_yaml(overrides))
    for section, key, source in (
        ("model", "teacher", teacher),
        ("model", "student", student),
        ("data", "train", train),
    ):
        if source is not None:
            merge(tree, {section: {key: _named(key, source)}})
    if stages is not None:
        if not isinstance(stages, Mapping):
            if len(set(stages)) < len(stages):
                raise ConfigError(f"stages {list(stages)} names a method twice: give the stages by name, as a mapping")
            stages = {method: {"method": method} for method in stages}
        tree["stages"] = nested(_as_yaml(stages))
    if recipe is None:
        found = recipe_from("distill", tree)
    elif isinstance(recipe, Recipe):
        found = recipe_from(recipe.name, recipe.to_dict(), tree)
    else:
        found = load_recipe(_named("recipe", recipe), overrides=tree)
    with _no_progress_bars(), first_process_tells():
        return run_recipe(found, with_evaluation=bool(found.run.data.eval), resume=resume)


def load_recipe(path: Source, *, smoke: bool = False, **overrides: Any) -> "Recipe":
    """Read a recipe from YAML and check it.

    Args:
        path: the YAML file.
        smoke: apply the section `smoke:` of the recipe, which makes it short.
        **overrides: sections and keys of minillm/config/schema.py, laid over the recipe, as in `distill`.

    Returns:
        A Recipe: `name`, `run` (a RunConfig) and `stages` (a StageConfig by name).

    Raises:
        ConfigError: a key or value that is unknown, misplaced, mistyped or contradicts another.
        FileNotFoundError: no file at `path`.

    Examples:
        >>> import minillm
        >>> recipe = minillm.load_recipe("recipe.yaml", optim={"lr": 1e-5})
        >>> {name: stage.method for name, stage in recipe.stages.items()}
        {'warm-up': 'kd', 'minillm': 'minillm'}
    """
    from minillm.config import recipe
    from minillm.config.recipe import nested

    return recipe.load_recipe(_named("recipe", path), smoke=smoke, overrides=nested(_as_yaml(overrides)))


def evaluate(
    model: Source,
    data: Source,
    /,
    *,
    teacher: Source | None = None,
    tokenizer: Source | None = None,
    **overrides: Any,
) -> "Evaluation":
    """Measure a model on prompts with reference answers, as `minillm evaluate` does.

    Several processes (accelerate launch) share the work; the result of each is the same as that of one.

    Args:
        model: the model, or the address of a server of `minillm teach`. What is loaded, a teacher too, is loaded in
            `model={"dtype": …}`, float32 by default.
        data: prompts with answers.
        teacher: also measure the KL divergences and the exposure bias against this model, of the same tokenizer. The
            address of a server says all of it; a directory of `minillm teach --out`, written of `data`, says the
            divergences along the references.
        tokenizer: where `model` is an address, the model whose tokenizer and chat template it has.
        **overrides: the sections `eval`, `engine`, `model`, `teacher`, `data` and `log` of minillm/config/schema.py,
            as `eval={"prompts": 100}`. By default all prompts are evaluated, with five samples of 256 tokens.

    Returns:
        An Evaluation: `means["rouge_l/greedy"].mean`, `means["reverse_kl/own_samples"].standard_error`, `calibration`,
        `exposure_bias`, `responses` and more; `to_dict()` is its JSON.

    Raises:
        ConfigError, DataError, PackageError: a setting, a source or a package that cannot be used.
        ServerLost: a server that no longer answers.

    Examples:
        >>> import minillm
        >>> limits = {"samples": 2, "sample_tokens": 8, "greedy_tokens": 8}
        >>> result = minillm.evaluate("student", "eval.jsonl", teacher="teacher", eval=limits)
        >>> result.prompts, len(result.means["rouge_l/sampled"].seeds.by_seed)
        (6, 2)
        >>> result.means["reverse_kl/references"].mean > 0
        True
    """
    import dataclasses
    import json

    from accelerate import PartialState

    from minillm.config.recipe import merged, nested, run_from
    from minillm.config.schema import ConfigError
    from minillm.config.teacher import addresses, wrong_address
    from minillm.data.examples import read_records
    from minillm.evaluation.measure import DEFAULTS, PARTS, evaluation_set, generation, left_out, measure
    from minillm.model.check import check_decoding, check_forward, check_same_tokenizer
    from minillm.model.head import CausalLM
    from minillm.model.load import load_model, load_tokenizer
    from minillm.run.directory import environment
    from minillm.run.workers import first_process_tells
    from minillm.teacher.choose import elsewhere, is_elsewhere
    from minillm.teacher.served import ServedTeacher
    from minillm.terminal import say

    tree = nested(_as_yaml(overrides))
    if unread := tree.keys() - (read := ("eval", "engine", "model", "teacher", "data", "log")):
        raise ConfigError(f"an evaluation does not read {min(unread)!r}; it reads the sections {', '.join(read)}")
    source, data, against = _named("model", model), _named("data", data), teacher and _named("teacher", teacher)
    served, named = bool(addresses(source)), tokenizer and _named("tokenizer", tokenizer)
    if served != bool(named):
        raise ConfigError(
            f"{source} is a server, which sends no tokenizer: name the model that it serves, or one of its family, as "
            "tokenizer (--tokenizer)"
            if served
            else f"{source} has a tokenizer of its own: leave out tokenizer (--tokenizer), which is for servers"
        )
    config = run_from(merged({"eval": DEFAULTS}, tree, {"data": {"eval": data}}))

    def load(name: str) -> Any:
        device = PartialState().device
        if is_elsewhere(name):
            return elsewhere(name, config.teacher, tokens, device)
        found = load_model(name, config.model.dtype, config.model.attn).to(device)
        check_forward(found)
        return CausalLM(found, config.model.head)

    for name, address in (("the model", source), ("the teacher", against or "")):
        if wrong := wrong_address(address):
            raise ConfigError(f"{name} is {wrong}")
    in_vllm = config.teacher.provider == "vllm"
    if served and in_vllm:
        raise ConfigError(f"{source} is to be evaluated itself, which needs a server of `minillm teach`")
    if (in_vllm or config.teacher.files) and not (in_vllm and addresses(against or "")):
        raise ConfigError("teacher.provider vllm and teacher.files are for a teacher that is the address of vLLM")
    with _no_progress_bars(), first_process_tells():
        tokens = load_tokenizer(named or source)
        if against and not is_elsewhere(against):
            check_same_tokenizer(tokens, load_tokenizer(against))
        examples, student = evaluation_set(config, tokens), load(source)
        if isinstance(student, CausalLM):
            check_decoding(student)
        settings = json.dumps(generation(config, tokens), ensure_ascii=False)
        records = len(read_records(data))
        judge = load(against) if against else None
        if isinstance(judge, CausalLM):
            judge.requires_grad_(False)
        if PartialState().is_main_process:
            say(f"{data}: {len(examples)} of {records} records; generation: {settings}", error=True)
            if words := left_out(judge, PARTS):
                say(words, error=True)
        try:
            result = measure(student, judge, tokens, examples, config)
        finally:
            for lm in (student, judge):
                if lm is not None:
                    lm.close()
    about: dict[str, Any] = {"model": source, "teacher": against, "data": data, "records": records}
    if not isinstance(student, ServedTeacher):
        about["parameters"] = student.model.num_parameters()
    return dataclasses.replace(result, about=about | {"environment": environment()})


def _named(what: str, source: Source) -> str:
    """The source as text. Raises ConfigError for an object."""
    from minillm.config.schema import ConfigError

    if isinstance(source, (str, PathLike)):
        return str(source)
    raise ConfigError(
        f"{what} is a {type(source).__name__}; expected the path of a file or directory, a hub id or package:NAME. "
        "A model in memory is given by the directory that model.save_pretrained and tokenizer.save_pretrained wrote"
    )


def _as_yaml(tree: Any) -> Any:
    """Paths as text."""
    if isinstance(tree, Mapping):
        return {key: _as_yaml(value) for key, value in tree.items()}
    return str(tree) if isinstance(tree, PathLike) else tree


@contextmanager
def _no_progress_bars() -> "Iterator[None]":
    """No progress bars of loading and saving between our lines."""
    from transformers.utils import logging

    from minillm.terminal import quiet_libraries

    shown = logging.is_progress_bar_enabled()
    quiet_libraries()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
