"""Whether teacher, tokenizers and data are what they should be."""

import math

import torch

from minillm.data.prompts import encode_prompt
from minillm.doctor.patient import TOKENS, Finding, Patient, judged
from minillm.model.cost import cost
from minillm.model.head import CausalLM
from minillm.model.load import load_tokenizer
from minillm.teacher.stored import StoredTeacher
from minillm.terminal import printable


def teacher_knows_something(patient: Patient) -> Finding:
    """A teacher that answers with one law for every token, as after a sleep, without weights, or behind a fault."""
    if patient.context.teacher is None:
        return Finding("skipped", "no teacher")
    logits = patient.logits(patient.context.teacher, patient.answers)
    spread = float((logits.amax(-1) - logits.amin(-1)).mean())
    entropy = float(torch.distributions.Categorical(logits=logits).entropy().mean())
    moves = float((logits.log_softmax(-1) - logits.log_softmax(-1)[0]).abs().amax()) if len(logits) > 1 else math.inf
    return judged(
        spread > 1e-2 and moves > 1e-3,
        f"entropy {entropy:.2f} nats a token on the answers; a uniform law has {math.log(patient.columns):.2f}",
        "the teacher has the same law everywhere: its weights are missing or zero; load it anew",
    )


def aligned(patient: Patient) -> Finding:
    """Answers against their states: the model prefers its targets to the tokens one before and one after."""
    targets = patient.answers.targets
    logprobs = patient.logits(patient.judge, patient.answers).log_softmax(-1)
    now, told, apart = logprobs.gather(1, targets[:, None])[:, 0], [], []
    for shift in (1, -1):  # what wraps around stands between unrelated answers, as any first token does
        shifted = logprobs.gather(1, targets.roll(shift)[:, None])[:, 0].clamp(min=-1e3)
        better = shifted - now.clamp(min=-1e3)
        told.append(f"{-float(shifted.mean()):.2f}")
        apart.append(float(better.mean()) > max(0.5, 5 * float(better.std()) / math.sqrt(len(targets))))
    return judged(
        not any(apart),
        f"{-float(now.mean()):.2f} nats a token; {' and '.join(told)} for the tokens before and after",
        "the targets seem shifted by one against the tokens: the answers hold something else than plain text, or the "
        "tokenizer is another model's",
    )


def ends(patient: Patient) -> Finding:
    """Where the answers end, the teacher ends as well, by a token that ends a response here."""
    context, batch = patient.context, patient.answers
    tokens = torch.tensor(context.ends, device=batch.targets.device)
    mass = patient.logits(patient.judge, batch).softmax(-1)[:, tokens[tokens < patient.columns]].sum(-1)
    last = torch.isin(batch.targets, tokens)
    names = ", ".join(printable(str(t)) for t in context.tokenizer.convert_ids_to_tokens(list(context.ends)))
    if not last.any() or last.all():
        return Finding("skipped", f"no answer here is whole within {TOKENS} tokens; a response ends at {names}")
    there, elsewhere = float(mass[last].mean()), float(mass[~last].mean())
    return judged(
        there > elsewhere,
        f"{names}: probability {there:.3f} where answers end, {elsewhere:.3f} elsewhere",
        "the model does not end where the answers end: rollouts will run to their limit. Check the chat template and "
        "generation_config.eos_token_id of both models",
        otherwise="warning",
    )


def padding(patient: Patient) -> Finding:
    """Columns of the heads that no token of the tokenizer has."""
    known = len(patient.context.tokenizer)
    if known > patient.columns:
        return Finding(
            "warning",
            f"the tokenizer has {known} tokens, the heads share {patient.columns} columns",
            "the tokens above can neither be sampled nor learnt; resize the smaller model's head if you need them",
        )
    masses = {
        name: patient.logits(lm, patient.answers).softmax(-1)[:, known:].sum(-1) for name, lm in patient.lms.items()
    }
    told = ", ".join(f"{name} {float(mass.mean()):.1e}" for name, mass in masses.items())
    return judged(
        all(float(mass.mean()) < 1e-3 for mass in masses.values()),
        f"{patient.columns - known} columns without a token; probability on them: {told}",
        "a model puts probability on ids that stand for nothing: is the tokenizer that of the models?",
        otherwise="warning",
    )


def templates(patient: Patient) -> Finding:
    """Prompts in the student's template against the teacher's own."""
    run, context = patient.context.run, patient.context
    if not (run.model.student and run.model.teacher):
        return Finding("skipped", "teacher and student have one tokenizer")
    if not isinstance(context.teacher, CausalLM):
        return Finding("skipped", "the teacher is not in this process; its tokenizer is the student's by its digest")
    theirs = load_tokenizer(run.model.teacher)
    if run.data.prompt_template == "chat" and not theirs.chat_template:
        return Finding(
            "warning", "the teacher has no chat template", "it was not trained on such prompts: see its card"
        )
    for example in context.examples:
        prompt = encode_prompt(example.record, theirs, run.data)
        if prompt != example.prompt:
            ours, wanted = (printable(str(theirs.decode(ids))) for ids in (example.prompt, prompt))
            return Finding(
                "warning",
                f"{example.record.where}: prompts are written as {ours!r}, the teacher's template writes {wanted!r}",
                "the teacher judges prompts of a form it was not trained on: save the teacher's template with the "
                "student, or set data.prompt_template",
            )
    return Finding("ok", f"the same tokens for {len(context.examples)} prompts")


def decoding(patient: Patient) -> Finding:
    """Every token of a few prompts and answers means the same text to both tokenizers."""
    run, context = patient.context.run, patient.context
    if not (run.model.student and run.model.teacher):
        return Finding("skipped", "teacher and student have one tokenizer")
    if not isinstance(context.teacher, CausalLM):
        return Finding("skipped", "the teacher is not in this process; its tokenizer is the student's by its digest")
    theirs = load_tokenizer(run.model.teacher)
    used = sorted({token for e in context.examples for token in (*e.prompt, *e.response)} | set(context.ends))
    differing = [token for token in used if context.tokenizer.decode([token]) != theirs.decode([token])]
    shown = ", ".join(f"{t}: {context.tokenizer.decode([t])!r} and {theirs.decode([t])!r}" for t in differing[:3])
    return judged(
        not differing,
        f"{len(used)} tokens" + (f"; differing {shown}" if differing else " read alike"),
        "one id stands for two texts: choose a student of the teacher's family",
    )


def reliability(patient: Patient) -> Finding:
    """The teacher on the student's own prefixes, early and late: what it says of texts that nobody would write."""
    if patient.context.teacher is None or isinstance(patient.context.teacher, StoredTeacher):
        return Finding("skipped", "no teacher that could be asked")
    batch, rollout = patient.batch(patient.samples), patient.samples
    law = torch.distributions.Categorical(logits=patient.logits(patient.context.teacher, batch))
    position = torch.arange(rollout.token_ids.shape[1], device=rollout.lengths.device).expand_as(rollout.mask)
    late = position[rollout.mask] >= rollout.token_ids.shape[1] // 2
    entropy, nll = law.entropy(), -law.log_prob(batch.targets)
    told = [
        f"{when}: entropy {float(entropy[rows].mean()):.2f}, nats a token {float(nll[rows].mean()):.2f}"
        for when, rows in (("first half", ~late), ("second half", late))
        if rows.any()
    ]
    return judged(
        float(entropy.mean()) < 0.8 * math.log(patient.columns),
        "; ".join(told),
        "the teacher hardly prefers any token after what the student writes: warm the student up by kd first",
        otherwise="warning",
    )


def memory(patient: Patient) -> Finding:
    """The estimate of the stage's peak, against what the device has."""
    needed = cost(patient.whole.run, patient.whole.config).peak
    if torch.cuda.is_available():
        there = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    else:
        import psutil

        there = psutil.virtual_memory().total
    return judged(
        needed < 0.9 * there,
        f"{needed / 2**30:.1f} GiB needed at the longest sequences, {there / 2**30:.1f} GiB there",
        "lower optim.micro_batch_size or rollout.chunk_size, or set model.recompute; docs/your-model.md has the list",
    )
