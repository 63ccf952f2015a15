"""What is asked of a vLLM server: completions of token ids, adapters, weights read again.

Endpoints and fields of vLLM's OpenAI-compatible server, as its documentation has them:
``/v1/models``, ``/v1/completions`` (``return_token_ids``: vLLM 0.10.2 or newer),
``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter`` (VLLM_ALLOW_RUNTIME_LORA_UPDATING),
``/collective_rpc`` with ``reload_weights`` and ``/reset_prefix_cache`` (VLLM_SERVER_DEV_MODE).
Log-probabilities are the server's ``raw_logprobs`` (its default): before temperature, top-k, top-p.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_phf.files.foreign import shown
from megatron_phf.rollout.protocol import Response
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.rollout.vllm.http import HttpServer, StatusError, TransientError


@dataclass(frozen=True)
class Question:
    """One prompt, its sampling, its seed, and how many tokens may follow."""

    prompt: list[int]
    sampling: SamplingParams
    seed: int
    max_tokens: int

    def as_json(self, model: str) -> dict[str, Any]:
        """The body of ``/v1/completions``.

        All that a server takes from the model's generation_config.json where a request is silent
        is said, and nothing ends a response but our stop tokens.
        """
        s = self.sampling
        return {
            "model": model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "top_k": s.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": self.seed,
            "ignore_eos": True,
            "stop_token_ids": list(s.stop_ids),
            "logprobs": 0,
            "return_token_ids": True,
            "add_special_tokens": False,
            "n": 1,
            "stream": False,
        }


class VllmServer(HttpServer):
    """One vLLM server; every method ends with its result or a ValueError that names the URL."""

    def models(self, until: float) -> list[dict[str, Any]]:
        """The model and the adapters that it serves."""
        content = self.until_it_succeeds(
            "GET /v1/models", lambda: self.call("GET", "/v1/models"), until
        )
        data = content.get("data") if isinstance(content, dict) else None
        if not isinstance(data, list) or not all(isinstance(card, dict) for card in data):
            raise ValueError(f"--vllm-url {self.url}: /v1/models is not vLLM's")
        return data

    def complete(
        self,
        question: Question,
        model: str,
        vocab_size: int,
        until: float,
        stopped: threading.Event,
        on_missing: Callable[[], None],
        policy: Callable[[], int | None] = lambda: None,
    ) -> Response:
        """Ask for one response.

        Args:
            vocab_size: token ids from here on are another model's.
            on_missing: called where the server does not know ``model``, before another attempt: it
                was restarted.
            policy: which one the server has now, asked before and behind the response.
        """

        def attempt() -> Response:
            begun = policy()
            try:
                answer = self.call("POST", "/v1/completions", question.as_json(model))
            except StatusError as error:
                if error.status != 404:
                    raise
                on_missing()
                raise TransientError(str(error)) from error
            response, ended = self._checked(answer, question, vocab_size), policy()
            end = None if ended == begun else ended
            return dataclasses.replace(response, policy_version=begun, policy_version_end=end)

        return self.until_it_succeeds("POST /v1/completions", attempt, until, stopped)

    def _checked(self, answer: Any, question: Question, vocab_size: int) -> Response:
        choice = _choice(answer)
        where = f"--vllm-url {self.url}: /v1/completions"
        ids, prompt = choice.get("token_ids"), choice.get("prompt_token_ids")
        if ids is None:
            raise ValueError(f"{where} gave no token_ids; vLLM 0.10.2 or newer is needed")
        if prompt is not None and prompt != question.prompt:
            raise ValueError(f"{where} answered another prompt than the one sent")
        problem = _wrong_ids(ids, choice.get("finish_reason"), question, vocab_size)
        if problem:
            raise ValueError(f"{where}: {problem}; does it serve the model of --hf-model?")
        logs = _numbers(choice.get("logprobs"), len(ids))
        if logs is None:
            raise ValueError(f"{where} gave no log-probability for each token")
        return Response(list(ids), logs)

    def load_adapter(self, name: str, path: str, until: float) -> None:
        """Serve the adapter directory ``path`` as model ``name``; nothing where it does already."""

        def attempt() -> None:
            body = {"lora_name": name, "lora_path": path}
            try:
                self.call("POST", "/v1/load_lora_adapter", body)
            except TransientError:
                if not self._knows(name, until):
                    raise
            except StatusError as error:
                # An earlier attempt, whose answer was lost, or another rank's.
                if not self._knows(name, until):
                    raise StatusError(error.status, error.message + _ADAPTER_HELP) from error

        self.until_it_succeeds(f"loading the adapter {path}", attempt, until)

    def _knows(self, name: str, until: float) -> bool:
        return any(card.get("id") == name for card in self.models(until))

    def unload_adapter(self, name: str, until: float) -> None:
        """Forget an adapter; nothing where the server does not know it (any longer)."""

        def attempt() -> None:
            try:
                self.call("POST", "/v1/unload_lora_adapter", {"lora_name": name})
            except StatusError as error:
                if error.status != 404:
                    raise

        self.until_it_succeeds("POST /v1/unload_lora_adapter", attempt, until)

    def reload_weights(self, until: float) -> None:
        """Read the model's directory again, and forget what was cached of the old weights."""

        def post(path: str, body: dict[str, Any] | None) -> Any:
            try:
                return self.call("POST", path, body)
            except StatusError as error:
                if error.status != 404:
                    raise
                raise StatusError(404, f"{path} is missing{_RELOAD_HELP}") from error

        def forget() -> None:
            answer = post("/reset_prefix_cache", None)
            # Status 200 all the same; versions before say nothing.
            if isinstance(answer, dict) and answer.get("success") is False:
                raise TransientError("requests that still run keep the old weights' prefix cache")

        self.until_it_succeeds(
            "reloading the weights",
            lambda: post("/collective_rpc", {"method": "reload_weights"}),
            until,
        )
        self.until_it_succeeds("POST /reset_prefix_cache", forget, until)


_ADAPTER_HELP = (
    "; start the server with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora "
    "--max-lora-rank (at least --lora-rank)"
)
_RELOAD_HELP = "; start the server with VLLM_SERVER_DEV_MODE=1"


def _choice(answer: Any) -> dict[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise TransientError(f"not a completion: {shown(answer)}")
    if choices[0].get("finish_reason") in ("abort", "error"):
        raise TransientError("the server gave the request up")
    return choices[0]


def _wrong_ids(ids: Any, reason: Any, question: Question, vocab_size: int) -> str | None:
    """Why ``ids`` are no response to ``question``; None where they are one."""
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        return f"token_ids are not numbers: {shown(ids)}"
    if not 1 <= len(ids) <= question.max_tokens:
        return f"{len(ids)} tokens, asked for 1 to {question.max_tokens}"
    if min(ids) < 0 or max(ids) >= vocab_size:
        return f"token ids from {min(ids)} to {max(ids)}, but the vocabulary ends at {vocab_size}"
    stops = set(question.sampling.stop_ids)
    if stops & set(ids[:-1]):
        return "tokens follow a stop token"
    if ids[-1] not in stops and len(ids) < question.max_tokens:
        why = f"finish_reason {shown(reason)}"
        return f"it ended before {question.max_tokens} tokens without a stop token ({why})"
    return None


def _numbers(log_probs: Any, count: int) -> list[float] | None:
    """The tokens' log-probabilities; None where one is missing or not finite."""
    values = log_probs.get("token_logprobs") if isinstance(log_probs, dict) else None
    if not isinstance(values, list) or len(values) != count:
        return None
    good = all(isinstance(x, int | float) and math.isfinite(x) for x in values)
    return [float(x) for x in values] if good else None
