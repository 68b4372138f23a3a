"""The tables of what rollouts and updates take."""

from __future__ import annotations

from cells import RESULTS, load, machine, markdown

LARGE = {"student": 3.1e9, "teacher": 15.2e9}
"""Bytes of the weights of 1.5B and 7B in bfloat16, which each forward pass reads."""


def timed(info: dict, titles: dict[str, str]) -> list[list[str]]:
    """A row for each title: seconds and tokens per second of what it names."""
    return [
        [title, f"{info['seconds'][name]:.2f}", f"{info['tokens_per_second'][name]:.0f}"]
        for name, title in titles.items()
    ]


def training_table() -> str:
    """What the trainer's own work takes on the demo pair."""
    results = load("cpu.json")
    info = {b["name"]: {**b["extra_info"], **b["stats"]} for b in results["benchmarks"]}
    rollout, update = info["test_rollout"], info["test_step"]
    titles = {
        "both_models": "both models, each token drawn from their mixture",
        "student_alone": "student alone",
        "teacher_alone": "teacher alone",
        "generate_student": "student alone, `transformers.generate`",
    }
    rows = timed(rollout, titles)
    ratio = rollout["both_over_sum_of_alone"]
    note = (
        f"{machine(results)}, least of a few in turns. Both models at once take {ratio:.2f}× the sum of their own "
        f"times. An update from rollouts that exist, with its text, {update['tokens']} tokens: {update['median']:.2f} "
        "s. From the run that timed the kernels."
    )
    size = f"rollout of {rollout['sequences']} × {rollout['new_tokens']} tokens"
    return markdown([size, "time, s", "new tokens per second"], rows) + "\n\n" + note


def rollouts_table() -> str:
    """Rollouts of the demo pair in several ways."""
    results = load("rollouts.json")
    info = next(b["extra_info"] for b in results["benchmarks"])
    ending = f"responses that end after {info['mean_length_ending']:.0f} tokens in the mean"
    titles = {
        "in_turns_to_the_limit": "side by side, nothing ends, or nothing is dropped",
        "in_turns": f"side by side, {ending}, places in turns",
        "refilled": "the same, places refilled",
        "coins_first": "coins first, nothing ends",
        "student_alone": "student alone, nothing ends",
        "teacher_reads": "teacher, reading the responses once",
        "generate": "`transformers.generate`, student alone, nothing ends",
    }
    tokens, alone = info["tokens"], "student_alone"
    traffic = {  # bytes a token
        name: sum(LARGE[lm] * count for lm, count in passes.items()) / tokens[name]
        for name, passes in info["forwards"].items()
    }
    rows = []
    for name, title in titles.items():
        seconds, passes = info["seconds"][name], info["forwards"].get(name, {})
        cells = [str(passes.get(lm, "")) for lm in LARGE]
        per_token = traffic.get(name, 0) / traffic[alone]
        cells.append(f"{per_token:.2f}" if "student" in passes and name != "generate" else "")
        rows.append([title, f"{seconds:.2f}", f"{tokens[name] / seconds:.1f}", *cells])
    note = (
        f"{machine(results)}; processor time of one thread. Refilled places take the "
        f"responses that end {info['refilled_over_limit']:.2f}× as fast as decoding all to "
        f"the limit, and {info['refilled_over_in_turns']:.2f}× as fast as places in turns that drop what has ended. "
        f"Coins first takes {info['coins_first_over_floor']:.2f}× its floor, the student alone and the teacher that "
        "reads once. Last column: computed, not measured: the bytes of the weights of 7B and 1.5B in bfloat16 "
        f"({LARGE['teacher'] / 1e9:.1f} and {LARGE['student'] / 1e9:.1f} GB) that so many passes read, which is what "
        "counts on an H100, for a token of a response, as a multiple of the student's that decodes alone."
    )
    size = f"{info['sequences']} sequences, {info['places']} at once, up to {info['new_tokens']} tokens, alpha 0.2"
    header = [size, "time, s", "tokens per second", "passes: student", "teacher", "7B / 1.5B, computed"]
    return markdown(header, rows) + "\n\n" + note


def engine_table() -> str:
    """Rollouts of the demo pair by vLLM beside those of our own decoder."""
    if not (RESULTS / "engine.json").exists():
        return not_measured("pytest benchmarks/test_engine.py --benchmark-only --benchmark-json=FILE")
    results = load("engine.json")
    info = next(b["extra_info"] for b in results["benchmarks"])
    titles = {
        "student": "student alone",
        "student_vllm": "student alone, vLLM",
        "generate": "student alone, `transformers.generate`",
        "side_by_side": "mixture, both models side by side",
        "coins_first": "mixture, coins first, shared by all rows",
        "mixture_vllm": "mixture, two engines of vLLM, coins of its own for each row",
    }
    rows = timed(info, titles)
    note = (
        f"{machine(results)}, vLLM {info['vllm']}, float32, least of a few in turns; an engine's time includes the "
        f"weights that it is given. Then both models read the samples, in {info['seconds']['read']:.2f} s; "
        f"`rollout/engine_gap` was {info['engine_gap']:.0e}."
    )
    size = f"rollout of {info['sequences']} × {info['new_tokens']} tokens, alpha {info['alpha']}"
    return markdown([size, "time, s", "new tokens per second"], rows) + "\n\n" + note


def operators_table() -> str:
    """What the host dispatches for a token."""
    results = load("operators.json")
    titles = {"student": "student alone", "both": "both models", "coins_first": "coins first, but the teacher's turns"}
    rows = [
        [titles[name], f"{row['launched']:.0f}", f"{row['replayed']:.0f}", f"{row['held']:.0f}"]
        for name, row in results["rows"].items()
    ]
    note = f"Counted, not timed, on a CPU: `{results['command']}`, torch {results['torch_version']}."
    header = ["operators a token", "one by one", "beside two graphs", "held by them"]
    return markdown(header, rows) + "\n\n" + note


def coins_table() -> str:
    """The variance of the gradient with shared coins."""
    if not (RESULTS / "coins.json").exists():
        return not_measured("python benchmarks/coins_variance.py")
    results = load("coins.json")
    rows = [
        [name, f"{row['variance']:.3g}", f"{row['over_own_coins']:.2f} ± {row['standard_error']:.2f}"]
        for name, row in results["rows"].items()
    ]
    note = (
        f"{results['rollouts']} rollouts of {results['prompts']} × {results['new_tokens']} tokens, alpha "
        f"{results['alpha']}, of the demo pair; trace of the covariance of the gradient of `{results['matrix']}`; ± "
        f"is a standard error of the ratio; made by `{results['command']}`."
    )
    return markdown(["coins", "variance of the gradient", "of that with own coins"], rows) + "\n\n" + note


def not_measured(command: str) -> str:
    return f"Not measured yet; `{command}` measures it."
