"""Whether what is computed is what is meant: losses, gradients, samples and their log-probs."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minillm.doctor.patient import TOKENS, Finding, Patient, judged
from minillm.model.head import CausalLM, Output
from minillm.teacher.stored import StoredTeacher
from minillm.train.baselines import cross_entropy, label_loss, on_policy_loss
from minillm.train.loop import METHODS
from minillm_kernels import fused_divergence_loss, use_backend


def teacher_into_itself(patient: Patient) -> Finding:
    """The teacher in the student's place, through the whole pipeline: its loss and gradient are 0."""
    context, teacher = patient.context, patient.context.teacher
    if teacher is None or context.config.method in ("sft", "seqkd"):
        return Finding("skipped", "this stage compares no two distributions")
    if not isinstance(teacher, CausalLM):
        return Finding("skipped", "the teacher is not in this process")
    examples = [example._replace(teacher_prompt=None) for example in context.examples]  # else it is told more
    context = replace(context, student=teacher, examples=examples)
    loss, gradient, tokens = 0.0, 0.0, 0
    for part in METHODS[context.config.method](context, Path()).step(1).parts:
        batch = part.batch(patient.tried(part.examples)).to(context.accelerator.device)
        with torch.no_grad():
            output = teacher.output(batch)
        states = output.states.detach().requires_grad_()
        value = part.loss(Output(states, output.head), batch)["loss"]
        (slope,) = torch.autograd.grad(value, states)
        label = context.beside_teacher(partial(label_loss, context))(Output(states, output.head), batch)["loss"]
        (plain,) = torch.autograd.grad(label, states)
        loss, tokens = loss + abs(float(value.detach())), tokens + len(batch.targets)
        gradient = max(gradient, float(slope.detach().float().norm() / plain.detach().float().norm().clamp(min=1e-30)))
    bound = patient.rounding(teacher, exact=1e-3, half=0.1)
    return judged(
        loss / tokens < bound and gradient < bound,
        f"loss {loss / tokens:.1e} nats a token, gradient {gradient:.1e} of cross entropy's",
        "two passes of one model do not agree: look for dropout, a head that is read wrongly, or differing positions",
    )


def formula(patient: Patient) -> Finding:
    """The stage's loss on a few answers, against its formula in float64 on the models' own logits."""
    context, batch, settings = patient.context, patient.answers, patient.context.config.loss
    student, teacher = context.student, context.teacher
    with torch.no_grad():
        output = student.output(batch)
        if teacher is None or context.config.method in ("sft", "seqkd"):
            what, found = "cross entropy", float(cross_entropy(context, output, batch))
            logprobs = patient.logits(student, batch).log_softmax(-1)
            expected = -float(logprobs.gather(1, batch.targets[:, None]).sum())
        else:
            if context.config.method == "minillm":
                settings = replace(settings, divergence="reverse_kl", temperature=1.0)
            context = replace(context, config=replace(context.config, loss=settings))
            loss = context.beside_teacher(partial(on_policy_loss, context))
            what, found = settings.divergence, float(loss(output, batch)["loss/distill"])
            logits = patient.logits(student, batch), patient.logits(teacher, batch)
            options = {"beta": settings.beta, "temperature": settings.temperature, "reduction": "sum"}
            if settings.support == "top_k":
                assert isinstance(teacher, StoredTeacher)
                law, options["temperature"] = teacher.law(batch), 1.0
                logits = law.outcomes_of(logits[0] / settings.temperature), law.outcomes().double()
            with use_backend("reference"):
                expected = float(fused_divergence_loss(*logits, settings.divergence, **options))  # type: ignore
    found, expected = found / len(batch.targets), expected / len(batch.targets)
    bound = patient.rounding(*patient.lms.values(), exact=1e-3, half=5e-2)
    return judged(
        abs(found - expected) <= bound * max(1.0, abs(expected)),
        f"{what} {found:.4f} nats a token at temperature {settings.temperature:g}, by its formula {expected:.4f}",
        "set model.head to logits, and report the two models",
    )


def slope(patient: Patient) -> Finding:
    """The gradient that training follows, against finite differences of the loss along it, in a few matrices."""
    context = patient.context
    if context.config.method == "seqkd":
        return Finding("skipped", "its loss is that of sft, on answers that do not exist yet")
    if isinstance(context.teacher, CausalLM) and context.teacher.model is context.student.model:
        return Finding("skipped", "the teacher is the student itself, and finite differences would move both")
    part = METHODS[context.config.method](context, Path()).step(1).parts[0]
    batch = part.batch(patient.tried(part.examples)).to(context.accelerator.device)
    trained = [p for p in context.student.parameters() if p.requires_grad and p.dim() > 1]
    chosen = [trained[i] for i in sorted({0, len(trained) // 2, len(trained) - 1})]

    def loss() -> Tensor:
        return part.loss(context.student.output(batch), batch)["loss"] / len(batch.targets)

    worst, here = 0.0, loss()
    if abs(float(here.detach())) < 1e-5:
        return Finding("skipped", "teacher and student agree here: the loss is 0, and so is its gradient")
    for parameter, gradient in zip(chosen, torch.autograd.grad(here, chosen), strict=True):
        size, kept = float(gradient.detach().norm()), parameter.detach().clone()
        if size == 0:
            continue
        error = math.inf
        for change in (1e-2, 1e-3):  # of the loss: too large bends, too small drowns in rounding
            if error < 0.1:
                break
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.copy_(kept + sign * change / size**2 * gradient)
                    ends.append(float(loss()))
            error = abs((ends[0] - ends[1]) / (2 * change) - 1)
        with torch.no_grad():
            parameter.copy_(kept)
        worst = max(worst, error)
    return judged(
        worst < 0.1,
        f"differs by {worst:.1%} from finite differences of the loss, at most, in {len(chosen)} matrices",
        "the gradient is not that of the loss: look for frozen or shared weights, or report the model",
    )


def own_samples(patient: Patient) -> Finding:
    """Samples have their model's entropy as negative log-likelihood: the sampler draws from the law that it states."""
    lm = patient.local
    name = "student" if lm is patient.context.student else "teacher"
    rollout = patient.sampled(lm, TOKENS // 2, copies=4)
    logprobs = patient.logits(lm, patient.batch(rollout)).log_softmax(-1)
    drawn = logprobs.gather(1, rollout.token_ids.flatten()[:, None])[:, 0]
    p = logprobs.exp()
    entropy = -(p * logprobs.clamp(min=-1e4)).sum(-1)
    variance = ((p * logprobs.clamp(min=-1e4).square()).sum(-1) - entropy.square()).clamp(min=0)
    z = float((-drawn - entropy).sum() / variance.sum().sqrt().clamp(min=1e-9))
    return judged(
        abs(z) < 5,
        f"{name}: {-float(drawn.mean()):.3f} nats a token where its entropy is {float(entropy.mean()):.3f} "
        f"({z:+.1f} standard errors, {len(drawn)} tokens)",
        "the sampler draws from another law than the model's own forward pass has: set model.head to logits, or "
        "report the model",
    )


def rollout_and_update(patient: Patient) -> Finding:
    """Log-probs of a rollout against those of the forward pass that the update makes."""
    rollout, context = patient.samples, patient.context
    batch = patient.batch(rollout)
    with torch.no_grad(), context.autocast():
        output = context.student.output(batch)
        again = context.student.logits(output.states)[:, : patient.columns].float().log_softmax(-1)
    drift = float(
        (again.gather(1, batch.targets[:, None])[:, 0] - rollout.student_logprobs[rollout.mask]).abs().mean()
    )
    return judged(
        drift < patient.rounding(context.student, exact=1e-2, half=0.3),
        f"{drift:.1e} nats apart in the mean",
        "decoding with a cache is not the forward pass of this model: set model.attn to eager, or take another model",
    )
