"""A small HTTP server with vLLM's documented endpoints over a transformers model; can misbehave.

It knows exactly the endpoints and fields that vLLM 0.32 has of those the product uses, and refuses
others.  Faults are taken from a list, one a completion: see ``FAULTS``.

    python -m tests.fake_vllm DIRECTORY [--delay LOW HIGH] [--slots N]
    python -m tests.fake_vllm serve DIRECTORY [--port N] [flags as of vllm serve]

serves in a process of its own and says where; the first ends with its standard input, and answers
without DIRECTORY as scripted, the second stands for the program ``vllm`` (see ``write_program``).
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from transformers import AutoModelForCausalLM

FAULTS = (
    *("ok", "500", "503", "400", "slow", "drip", "truncated", "closed", "not_json", "no_choice"),
    *("abort", "wrong_ids", "large_ids", "too_long", "early", "after_stop", "other_prompt"),
    *("no_token_ids", "no_log_probs", "nan_log_probs", "shifted_log_probs", "restart", "redirect"),
)
_FIELDS = {
    "/v1/completions": {
        *("model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n"),
        *("repetition_penalty", "presence_penalty", "frequency_penalty", "ignore_eos", "stream"),
        *("stop_token_ids", "logprobs", "return_token_ids", "add_special_tokens"),
    },
    "/v1/load_lora_adapter": {"lora_name", "lora_path", "load_inplace", "is_3d_lora_weight"},
    "/v1/unload_lora_adapter": {"lora_name", "lora_int_id"},
    "/collective_rpc": {"method", "args", "kwargs", "timeout"},
    "/reset_prefix_cache": set(),
    "/pause": set(),
    "/resume": set(),
    "/init_weight_transfer_engine": {"init_info"},
    "/start_weight_update": set(),
    "/update_weights": {"update_info"},
    "/finish_weight_update": {"weight_version"},
    "/sleep": set(),
    "/wake_up": set(),
}
_INIT = {
    "torch_distributed": {"master_address", "master_port", "world_size", "timeout_seconds"},
    "nccl": {
        *("nccl_unique_id_b64", "rank_offset", "world_size"),
        *("packed", "packed_buffer_size_bytes", "packed_num_buffers"),
    },
}
_UPDATE = {"names", "dtype_names", "shapes"}
SHIFT = 0.25


class _Problem(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Died(Exception):
    """No answer to this request."""


class LazyGroup:
    """A group of two as NCCL's: the first call of a kind waits in the host for the other member.

    One that has died is waited for until ``abort``.
    """

    def __init__(self, rank: int, store: Callable[[], dist.Store], seconds: timedelta) -> None:
        self.aborted = threading.Event()
        self._rank, self._store, self._seconds = rank, store, seconds
        self._group: dist.ProcessGroupGloo | None = None
        self._kinds: set[str] = set()

    def __getattr__(self, kind: str) -> Callable[..., _Work]:
        def call(*arguments: object) -> _Work:
            if self._group is None:
                self._group = dist.ProcessGroupGloo(self._store(), self._rank, 2, self._seconds)
            group, work = self._group, _Work(self.aborted)
            if kind not in self._kinds:
                self._kinds.add(kind)
                work.wait_for(group.barrier())
            work.work = getattr(group, kind)(*arguments)
            return work

        return call

    def abort(self) -> None:
        self.aborted.set()


class _Work:
    def __init__(self, aborted: threading.Event) -> None:
        self._aborted, self.work = aborted, None

    def wait_for(self, work: dist.Work) -> None:
        try:
            work.wait()
        except RuntimeError:
            self._aborted.wait(20)
            raise

    def wait(self) -> None:
        self.wait_for(self.work)


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024  # of a batch's connections, none waits a second to be tried again


class FakeVllm:
    """``with FakeVllm(directory) as server: server.url``; ``directory`` None: scripted answers."""

    def __init__(
        self,
        directory: str | None,
        faults: list[str] | None = None,
        api_key: str | None = None,
        dev_mode: bool = True,
        lora: bool = True,
        max_model_len: int = 256,
        down_seconds: float = 0.3,
        delay: tuple[float, float] = (0.0, 0.0),
        slots: int = 64,
        transfer: bool = False,
        backend: str = "torch_distributed",
        lazy: bool = False,
        die_at_messages: tuple[int, ...] = (),
        port: int = 0,
        host: str = "127.0.0.1",
    ) -> None:
        """With servers' troubles.

        Args:
            delay: seconds of a completion, as its seed decides.
            slots: so many at once.
            transfer: started with --weight-transfer-config, of this ``backend``.
            lazy: its groups are as NCCL's.
            die_at_messages: the numbers (from 0) of /update_weights at which it is restarted.
        """
        self.directory, self.api_key = directory, api_key
        self.dev_mode, self.lora, self.max_model_len = dev_mode, lora, max_model_len
        self.down_seconds, self._delay = down_seconds, delay
        self._slots = threading.Semaphore(slots)
        self.faults = list(faults or [])
        assert set(self.faults) <= set(FAULTS)
        self.log: list[tuple[str, dict]] = []
        self.most_at_once = self._at_once = 0
        self.scripted = [5, 6, 1]
        self.transfer, self.die_at_messages, self._messages = transfer, die_at_messages, 0
        self.backend, self.lazy, self.packages = backend, lazy, ""
        self.transfers: list[dict[str, torch.Tensor]] = []  # those that ended well
        # By seed: completions that have two tokens when the n-th transfer (from 1) comes, not more.
        self.held: dict[int, int] = {}
        # By seed: a completion that never ends; as soon as the function says so, the server dies.
        self.dies: dict[int, Callable[[], bool]] = {}
        # What a slow answer waits for, as long as who asked does.
        self.slow_until: Callable[[], bool] = lambda: False
        self._holding: set[int] = set()
        self._lock, self._counter = threading.Condition(), threading.Lock()
        self._load()
        self._host = host
        self._http = self._listen(port)
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def _load(self) -> None:
        self.adapters: dict[str, str] = {}
        self._adapted: dict[str, torch.nn.Module] = {}
        self._group, self._version = None, "default"
        self._paused = self._frozen = self._updating = False
        self.asleep = {"weights": False, "kv_cache": False}
        self.received: dict[str, torch.Tensor] = {}
        if self.directory is not None:
            self.model = load_model(self.directory)

    def _listen(self, port: int) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"fake": self})
        http = _Http((self._host, port), handler)
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        return http

    def stop(self) -> None:
        """Answer nobody any longer."""
        self._http.shutdown()
        self._http.server_close()

    def restart(self) -> None:
        """Away for a while; back with what its model's directory then holds, without adapters."""
        self.stop()
        self._come_back()

    def die(self) -> None:
        """The same, from within a request: there is nobody from now on."""
        self.stop()
        threading.Thread(target=self._come_back, daemon=True).start()

    def _come_back(self) -> None:
        time.sleep(self.down_seconds)
        self._load()
        self._http = self._listen(self.port)

    def __enter__(self) -> FakeVllm:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def next_fault(self) -> str:
        with self._counter:
            return self.faults.pop(0) if self.faults else "ok"

    def bodies(self, path: str) -> list[dict]:
        """The requests to one endpoint."""
        return [body for p, body in self.log if p == path]

    def entered(self, change: int) -> None:
        with self._counter:
            self._at_once += change
            self.most_at_once = max(self.most_at_once, self._at_once)

    # --- endpoints ---

    def models(self) -> dict:
        name = self.directory or "scripted"
        base = {"id": name, "object": "model", "root": name, "parent": None}
        base["max_model_len"] = self.max_model_len
        cards = [{"id": n, "root": p, "parent": name} for n, p in self.adapters.items()]
        return {"object": "list", "data": [base, *cards]}

    def load_adapter(self, body: dict) -> str:
        name, path = body["lora_name"], body["lora_path"]
        if not self.lora:
            raise _Problem(404, "Not Found")
        if name in self.adapters:
            raise _Problem(400, f"The lora adapter '{name}' has already been loaded.")
        if not os.path.isfile(os.path.join(path, "adapter_config.json")):
            raise _Problem(404, f"Loading lora {name} failed: No adapter found for {path}")
        with self._lock:
            if self.directory is not None:
                from peft import PeftModel  # takes seconds, which others need not wait for

                base = AutoModelForCausalLM.from_pretrained(self.directory)
                self._adapted[name] = PeftModel.from_pretrained(base, path).eval()
            self.adapters[name] = path
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload_adapter(self, body: dict) -> str:
        if self.adapters.pop(body["lora_name"], None) is None:
            raise _Problem(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        return "Success"

    def rpc(self, body: dict) -> dict:
        if not self.dev_mode:
            raise _Problem(404, "Not Found")
        assert body == {"method": "reload_weights"}
        if self.directory is None:
            return {"results": [None]}
        with self._lock:
            old, self.model = self.model, load_model(self.directory)
            if not has_head(self.directory):  # as vLLM on a CPU: what it made of a tied head stays
                self.model.lm_head.weight = old.lm_head.weight
        return {"results": [None]}

    def reset_prefix_cache(self) -> dict:
        """Requests that run hold blocks of it; the status is 200 then too."""
        if not self.dev_mode:
            raise _Problem(404, "Not Found")
        return {"success": self._at_once == 0}

    def wait(self, body: dict) -> None:
        """For as long as the completion would take."""
        if self._delay[1] > 0:
            with self._slots:
                time.sleep(random.Random(body["seed"]).uniform(*self._delay))

    def steer(self, path: str, body: dict) -> dict:
        """What a trainer tells it, in vLLM's order; anything else is vLLM's error 500."""
        route, _, query = path.partition("?")
        if not self.dev_mode:
            raise _Problem(404, "Not Found")
        if "weight" in route and not self.transfer:
            raise _Problem(500, "Weight transfer not configured.")
        if route in ("/pause", "/resume"):
            self._pause(query if route == "/pause" else None)
        elif route in ("/sleep", "/wake_up"):
            return self._bed(route, query)
        elif route == "/init_weight_transfer_engine":
            assert set(body["init_info"]) == _INIT[self.backend]
            self._join(**body["init_info"])
        elif route == "/start_weight_update":
            assert self._group is not None and (self._paused or self._frozen)
            assert not self.asleep["weights"]
            if self._updating:
                raise _Problem(500, "start_weight_update called while one is already active")
            self._updating, self.received = True, {}
        elif not self._updating:
            raise _Problem(500, f"start_weight_update must be called before {route}")
        elif route == "/update_weights":
            assert set(body["update_info"]) == _UPDATE
            self._update(**body["update_info"])
        else:
            self._updating = False
            self._version = body.get("weight_version", self._version)
            self.transfers.append(self.received)
        return {"message": "done"}

    def _pause(self, query: str | None) -> None:
        """``keep``: completions stop between two tokens, and new ones wait.  None: go on."""
        modes = {f"mode={mode}&clear_cache=true": mode for mode in ("wait", "keep")}
        mode = None if query is None else modes[query]
        with self._lock:
            coming = {seed for seed, n in self.held.items() if n == len(self.transfers) + 1}
            self._lock.wait_for(lambda: mode is None or coming <= self._holding)
            self._paused, self._frozen = mode == "wait", mode == "keep"
            self._lock.notify_all()

    def _join(
        self,
        world_size: int,
        master_address: str = "127.0.0.1",
        master_port: int = 0,
        timeout_seconds: float = 5.0,
        nccl_unique_id_b64: str = "",
        **packing: object,
    ) -> None:
        assert world_size == 2
        seconds = timedelta(seconds=timeout_seconds)
        if nccl_unique_id_b64:  # 128 bytes, here with a port in them (see the tests)
            identity = base64.b64decode(nccl_unique_id_b64, validate=True)
            assert len(identity) == 128
            master_port = int(identity.rstrip(b"\0"))
        store = dist.TCPStore(master_address, master_port, None, False, seconds)
        if self.lazy:
            self._group = LazyGroup(1, lambda: store, seconds)
        else:
            self._group = dist.ProcessGroupGloo(store, 1, 2, seconds)
        if nccl_unique_id_b64:
            self._group.allreduce(torch.ones(1)).wait()

    def _update(self, names: list[str], dtype_names: list[str], shapes: list) -> None:
        number, self._messages = self._messages, self._messages + 1
        tensors = [
            torch.empty(shape, dtype=getattr(torch, dtype))
            for shape, dtype in zip(shapes, dtype_names, strict=True)
        ]
        packed = torch.empty(sum(tensor.nbytes for tensor in tensors), dtype=torch.uint8)
        parcels = [packed] if self.backend == "nccl" else tensors
        for tensor in parcels[: len(parcels) // 2 if number in self.die_at_messages else None]:
            self._group.broadcast(tensor, 0).wait()
        if self.backend == "nccl":
            parts = packed.split([tensor.nbytes for tensor in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view(tensor.dtype).view(tensor.shape))
        if number in self.die_at_messages:
            self._group = None  # its connections end
            self.die()
            raise _Died
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, tensor in zip(names, tensors, strict=True):
            assert name not in self.received
            self.received[name] = tensor
            if name not in parameters or parameters[name].shape != tensor.shape:
                self._updating = False
                raise _Problem(500, f"no parameter {name} of shape {list(tensor.shape)}")
            with torch.no_grad():
                parameters[name].copy_(tensor)

    def _bed(self, route: str, query: str) -> dict:
        fields = dict(pair.split("=") for pair in query.split("&"))
        if route == "/wake_up":
            assert self.asleep[fields["tags"]]
            self.asleep[fields["tags"]] = False
            return {"status": "sleeping" if any(self.asleep.values()) else "awake"}
        assert fields["mode"] == "wait" and not any(self.asleep.values())
        if fields["level"] == "2":  # weights are gone
            for parameter in self.model.parameters():
                parameter.data.fill_(float("nan"))
        self.asleep = dict.fromkeys(self.asleep, True)
        return {"status": "sleeping", "level": int(fields["level"])}

    def complete(self, body: dict) -> dict:
        self.wait(body)
        name = body["model"]
        assert self._frozen or not (self._paused or self._updating or any(self.asleep.values()))
        if name not in self.adapters and name != self.models()["data"][0]["id"]:
            raise _Problem(404, f"The model `{name}` does not exist.")
        assert body["return_token_ids"] and body["ignore_eos"] and not body["stream"]
        if len(body["prompt"]) + body["max_tokens"] > self.max_model_len:
            raise _Problem(400, f"maximum context length is {self.max_model_len} tokens")
        if self.directory is None:
            ids = self.scripted[: body["max_tokens"]]
            logs = [-0.5] * len(ids)
        else:
            with torch.no_grad():
                model = self._adapted.get(name, self.model)
                ids, logs = sample(model, body, lambda number: self._turn(body, number))
        stopped = ids[-1] in body["stop_token_ids"]
        choice = {
            "index": 0,
            "text": "",
            "logprobs": {"token_logprobs": logs, "tokens": [""] * len(ids), "top_logprobs": []},
            "finish_reason": "stop" if stopped else "length",
            "stop_reason": ids[-1] if stopped else None,
            "prompt_token_ids": body["prompt"],
            "token_ids": ids,
        }
        return {"id": "cmpl-1", "object": "text_completion", "model": name, "choices": [choice]}

    @contextmanager
    def _turn(self, body: dict, number: int) -> Iterator[None]:
        """One token's, of a completion that has ``number`` of them."""
        with self._lock:
            if number == 2 and body["seed"] in self.held:
                self._holding.add(body["seed"])
                self._lock.notify_all()
                self._lock.wait_for(lambda: len(self.transfers) >= self.held[body["seed"]])
            self._lock.wait_for(lambda: not self._frozen)
            yield


def load_model(directory: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def has_head(directory: str) -> bool:
    with safe_open(os.path.join(directory, "model.safetensors"), "pt") as f:
        return "lm_head.weight" in f.keys()  # noqa: SIM118 (no dictionary)


def sample(
    model: torch.nn.Module,
    body: dict,
    turn: Callable[[int], AbstractContextManager[None]] = lambda number: nullcontext(),
) -> tuple[list[int], list[float]]:
    """vLLM's order: temperature, top-k, top-p; log-probabilities of the raw logits.

    ``turn``: around each token's computation, by how many came before.
    """
    generator = torch.Generator().manual_seed(body["seed"])
    ids, logs = list(body["prompt"]), []
    for number in range(body["max_tokens"]):
        with turn(number):
            raw = model(torch.tensor([ids])).logits[0, -1].double()
        if body["temperature"] == 0:
            token = int(raw.argmax())
        else:
            p = (raw / body["temperature"]).softmax(-1)
            order = p.argsort(descending=True)[: body["top_k"] or None]
            p = p[order] / p[order].sum()
            p = p * (p.cumsum(-1) - p < body["top_p"])
            token = int(order[torch.multinomial(p, 1, generator=generator)])
        ids.append(token)
        logs.append(float(raw.log_softmax(-1)[token]))
        if token in body["stop_token_ids"]:
            break
    return ids[len(body["prompt"]) :], logs


def _spoiled(answer: dict, fault: str, body: dict) -> dict:
    choice = answer["choices"][0]
    ids, logs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    stop = body["stop_token_ids"][0]
    if fault in ("wrong_ids", "large_ids", "too_long", "early", "after_stop"):
        choice["token_ids"] = {
            "wrong_ids": ["5"],
            "large_ids": [10**6, stop],
            "too_long": [5] * (body["max_tokens"] + 1),
            "early": [5],
            "after_stop": [stop, *ids],
        }[fault]
    elif fault == "other_prompt":
        choice["prompt_token_ids"] = [7, *body["prompt"]]
    elif fault == "no_token_ids":
        del choice["token_ids"]
    elif fault == "no_log_probs":
        choice["logprobs"] = None
    elif fault == "nan_log_probs":
        logs[0] = None
    elif fault == "shifted_log_probs":
        choice["logprobs"]["token_logprobs"] = [x + SHIFT for x in logs]
    elif fault == "abort":
        choice["finish_reason"] = "abort"
    elif fault == "no_choice":
        answer["choices"] = []
    return answer


class _Handler(BaseHTTPRequestHandler):
    fake: FakeVllm
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        fake = self.fake
        answers = {
            "/v1/models": fake.models,
            "/health": dict,
            "/get_world_size": lambda: {"world_size": 1},
            "/weight_info": lambda: {"weight_version": fake._version},
            "/is_sleeping": lambda: {"is_sleeping": any(fake.asleep.values())},
            "/server_info": lambda: {"system_env": {"pip_packages": fake.packages}},
        }
        if self.path not in answers:
            self._send(404, {"detail": "Not Found"})
        elif self._authorized():
            self._send(200, answers[self.path]())

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"] or 0))
        body = json.loads(data) if data else {}
        self.fake.log.append((self.path, body))
        if not self._authorized():
            return
        try:
            unknown = set(body) - _FIELDS[self.path.partition("?")[0]]
            if unknown:
                raise _Problem(400, f"unknown fields {unknown}")
            self._route(body)
        except _Died:
            self.close_connection = True
        except _Problem as problem:
            message = {"message": str(problem), "type": "x", "code": problem.status}
            self._send(problem.status, {"error": message})

    def _authorized(self) -> bool:
        key = self.fake.api_key
        good = key is None or self.headers["Authorization"] == f"Bearer {key}"
        if not good:
            self._send(401, {"error": "Unauthorized"})
        return good

    def _route(self, body: dict) -> None:
        fake = self.fake
        if self.path == "/v1/completions":
            fake.entered(+1)
            try:
                self._complete(body)
            finally:
                fake.entered(-1)
        elif self.path == "/v1/load_lora_adapter":
            self._send(200, fake.load_adapter(body))
        elif self.path == "/v1/unload_lora_adapter":
            self._send(200, fake.unload_adapter(body))
        elif self.path == "/collective_rpc":
            self._send(200, fake.rpc(body))
        elif self.path == "/reset_prefix_cache":
            self._send(200, fake.reset_prefix_cache())
        else:
            self._send(200, fake.steer(self.path, body))

    def _complete(self, body: dict) -> None:
        may = self.fake.dies.pop(body.get("seed"), None)
        while may is not None and not may():
            time.sleep(0.02)
        fault = self.fake.next_fault() if may is None else "restart"
        if fault == "restart":
            self.fake.die()
        if fault in ("restart", "closed"):
            self.close_connection = True
        elif fault in ("400", "500", "503"):
            self._send(int(fault), {"error": {"message": "scripted trouble"}})
        elif fault == "redirect":
            self._send(302, {}, {"Location": "http://127.0.0.1:9/"})
        elif fault == "not_json":
            self._send(200, "<html>")
        else:
            while fault == "slow" and not self.fake.slow_until():
                if select.select([self.connection], [], [], 0.01)[0]:  # who asked has gone
                    break
            answer = _spoiled(self.fake.complete(body), fault, body)
            self._send(200, answer, part=fault)

    def _send(
        self, status: int, content: object, headers: dict | None = None, part: str = ""
    ) -> None:
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            if part == "truncated":
                data, self.close_connection = data[:20], True
            for i in range(0, len(data), 1 if part == "drip" else len(data)):
                self.wfile.write(data[i : i + (1 if part == "drip" else len(data))])
                time.sleep(0.05 if part == "drip" else 0)
        except OSError:  # nobody listens any longer
            self.close_connection = True


def write_program(path: Path) -> None:
    """A ``vllm`` that serves so, called in the repository's folder."""
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.fake_vllm "$@"\n')
    path.chmod(0o755)


def servers_of(directory: Path) -> list[int]:
    """Process ids of programs that serve ``directory``, and of what watches over them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if b"serve" in words and str(directory).encode() in words:
            found.append(int(path.parent.name))
    return found


def main() -> None:
    """A server of its own."""
    serve = sys.argv[1:2] == ["serve"]
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", nargs="?")
    parser.add_argument("--delay", type=float, nargs=2, default=(0.0, 0.0))
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--slow-from", type=int, default=0, help="no answer behind so many")
    parser.add_argument("--host", default="" if serve else "127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--weight-transfer-config", type=json.loads)
    parser.add_argument("--enable-lora", action="store_true", default=not serve)
    parser.add_argument("--max-lora-rank", type=int)
    parser.add_argument("--tensor-parallel-size", type=int)
    arguments = parser.parse_args(sys.argv[1 + serve :])
    transfer = arguments.weight_transfer_config
    assert transfer in (None, {"backend": "torch_distributed"})
    torch.set_num_threads(1)
    faults = ["ok"] * arguments.slow_from + ["slow"] * 99 if arguments.slow_from else []
    with FakeVllm(
        arguments.directory, faults, delay=tuple(arguments.delay), slots=arguments.slots,
        lora=arguments.enable_lora, transfer=transfer is not None,
        host=arguments.host, port=arguments.port,
    ) as server:  # fmt: skip
        print(server.url, flush=True)
        signal.pause() if serve else sys.stdin.read()


if __name__ == "__main__":
    main()
