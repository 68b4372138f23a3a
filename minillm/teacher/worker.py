"""The one thread that computes: it takes what waits, puts the questions of several clients into one forward pass, and
never ends because a question failed."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm.model.head import CausalLM
from minillm.teacher.wire import Question, batch_of


class Job(NamedTuple):
    """A question about states, or any other work with the model, and where its result goes."""

    question: Question | None
    work: Callable[[], Any] | None
    future: "Future[Any]"


class Worker:
    """Answers jobs in the order in which they come. `submit` raises queue.Full where too many wait already."""

    def __init__(self, lm: CausalLM, max_tokens: int, waiting: int) -> None:
        """max_tokens: of a forward pass, padding included; a longer sequence has one for itself. waiting: jobs."""
        self.lm, self.max_tokens = lm, max_tokens
        self.jobs: queue.Queue[Job | None] = queue.Queue(waiting)
        self.thread = threading.Thread(target=self._run, name="teacher", daemon=True)
        self.thread.start()

    def submit(self, question: Question | None = None, work: Callable[[], Any] | None = None) -> "Future[Any]":
        job = Job(question, work, Future())
        self.jobs.put_nowait(job)
        return job.future

    def close(self) -> None:
        """End after what waits has been answered."""
        self.jobs.put(None)
        self.thread.join()

    def _run(self) -> None:
        held, ending = self.jobs.get(), False
        while held is not None:
            together, tokens, following = [held], self._tokens(held), None
            while held.question is not None and not self.jobs.empty():
                following = self.jobs.get()
                ending |= following is None
                if following is None or following.question is None:
                    break
                tokens += self._tokens(following)
                if tokens > self.max_tokens:
                    break
                together.append(following)
                following = None
            self._answer([each for each in together if each.future.set_running_or_notify_cancel()])
            held = following if following is not None or ending else self.jobs.get()

    def _tokens(self, job: Job) -> int:
        return len(job.question.ids) if job.question is not None else 0

    def _answer(self, jobs: list[Job]) -> None:
        """Jobs of one kind: questions, or one other work."""
        try:
            if jobs and jobs[0].work is not None:
                jobs[0].future.set_result(jobs[0].work())
                return
            questions = [job.question for job in jobs if job.question is not None]
            for job, states in zip(jobs, answer(self.lm, questions, self.max_tokens), strict=True):
                job.future.set_result(states)
        except Exception as error:  # of the model: this answer fails, the server goes on
            if len(jobs) > 1:  # each for itself: one that fails is no other client's fault
                for job in jobs:
                    self._answer([job])
            elif jobs:
                jobs[0].future.set_exception(error)


@torch.no_grad()
def answer(lm: CausalLM, questions: list[Question], max_tokens: int) -> list[Tensor]:
    """The states [N, H] that each question asks for, on the CPU, from forward passes of at most `max_tokens`."""
    if not questions:
        return []
    sequences = [sequence for question in questions for sequence in question.sequences()]
    asked: list[list[int]] = []
    for question in questions:
        ends = question.lengths.long().cumsum(0)
        for start, end in zip((ends - question.lengths).tolist(), ends.tolist(), strict=True):
            inside = question.positions[(question.positions >= start) & (question.positions < end)]
            asked.append((inside - start).tolist())
    found, first = [], 0
    while first < len(sequences):
        last, width = first + 1, len(sequences[first])
        while last < len(sequences):
            wider = max(width, len(sequences[last]))
            if wider * (last + 1 - first) > max_tokens:
                break
            width, last = wider, last + 1
        batch = batch_of(sequences[first:last], asked[first:last]).to(lm.device)
        found.append(lm.output(batch).states.cpu())
        first = last
    return list(torch.cat(found).split([len(question.positions) for question in questions]))
