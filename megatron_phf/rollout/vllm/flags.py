"""What is said of ``--rollout-engine vllm`` before a server is asked.  No import of torch."""

from __future__ import annotations

import json
import os
import re
import shlex
import urllib.parse

from megatron_phf.config.settings import Config

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")


def server_urls(config: Config) -> list[str]:
    """The servers of ``--vllm-url``, without the ``/v1`` of OpenAI's clients at the end.

    Raises:
        ValueError: one of them is no URL of a server.
    """
    urls = (config.vllm.vllm_url or "").split(",")
    urls = [url.strip().rstrip("/").removesuffix("/v1").rstrip("/") for url in urls]
    for url in urls:
        try:
            parts = urllib.parse.urlsplit(url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname)
            good = good and parts.port != 0 and not (parts.query or parts.fragment)
            good = good and parts.username is None and url.isascii() and url.isprintable()
        except ValueError:  # a port that is no number, half of an IPv6 address
            good = False
        if not good or " " in url:
            raise ValueError(
                f"--vllm-url {url!r}: need http://HOST:PORT of a vLLM server, several of them "
                "separated by commas"
            )
    return urls


def syncs_adapters(config: Config) -> bool:
    """Whether servers get the student's adapters, rather than whole checkpoints."""
    kind = config.vllm.vllm_weight_sync
    return kind == "adapter" or (kind == "auto" and config.lora.lora_rank > 0)


def syncs_by_disk(config: Config) -> bool:
    """Whether weights reach the servers as files, rather than over vLLM's weight-transfer API."""
    return config.vllm.vllm_weight_sync in ("auto", "adapter", "checkpoint")


def sync_directory(config: Config) -> str:
    """The directory, absolute, that the servers read weights from."""
    default = os.path.join(config.output.output_dir, "vllm")
    return os.path.realpath(config.vllm.vllm_sync_dir or default)


def read_api_key(config: Config) -> str | None:
    """The first line of ``--vllm-api-key-file``.

    Raises:
        ValueError: the file cannot be read, or holds no key.
    """
    path = config.vllm.vllm_api_key_file
    if path is None:
        return None
    try:
        with open(path, encoding="ascii") as f:
            key = f.readline().strip()
    except (OSError, ValueError) as error:
        raise ValueError(f"--vllm-api-key-file {path}: cannot be read ({error})") from error
    if not key or not key.isprintable():
        raise ValueError(f"--vllm-api-key-file {path}: no key in its first line")
    return key


def _check_timeout(config: Config) -> None:
    vllm = config.vllm
    minutes = config.parallel.distributed_timeout_minutes
    if config.rollout.rollout_engine == "vllm" and vllm.vllm_timeout_seconds >= 60 * minutes:
        raise ValueError(
            f"--vllm-timeout-seconds {vllm.vllm_timeout_seconds:g} reaches "
            f"--distributed-timeout-minutes {minutes:g}, after which the ranks that wait for the "
            "answers give up; raise the latter"
        )


def launch_words(config: Config) -> tuple[dict[str, str], list[str]]:
    """Variables and flags of ``--vllm-launch``, and what the run's other flags need of a server.

    Raises:
        ValueError: a quotation does not end.
    """
    launch = config.vllm.vllm_launch
    assert launch is not None
    try:
        words = shlex.split(launch)
    except ValueError as error:
        raise ValueError(f"--vllm-launch {launch!r}: {error}") from error
    variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    while words and _VARIABLE.match(words[0]):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    needed = []
    if not syncs_by_disk(config):
        backend = json.dumps({"backend": config.vllm.vllm_weight_sync})
        needed.append(["--weight-transfer-config", backend])
    elif syncs_adapters(config):
        needed.append(["--enable-lora"])
        needed.append(["--max-lora-rank", str(config.lora.lora_rank)])
    if config.vllm.vllm_colocated:
        needed.append(["--enable-sleep-mode"])
    given = {word.partition("=")[0] for word in words}
    return variables, [*words, *(w for flag in needed if flag[0] not in given for w in flag)]


def _check_launch(config: Config) -> None:
    vllm = config.vllm
    if vllm.vllm_url is not None or config.rollout.rollout_engine != "vllm":
        raise ValueError("--vllm-launch takes the place of --vllm-url, with --rollout-engine vllm")
    if syncs_by_disk(config) and not syncs_adapters(config):
        raise ValueError(
            "--vllm-launch serves --hf-model, whose files stay: send whole weights without files "
            "(--vllm-weight-sync torch_distributed, nccl or ipc)"
        )
    if {"--host", "--port"} & {word.partition("=")[0] for word in launch_words(config)[1]}:
        raise ValueError("--vllm-launch: --host and --port are the run's to choose")


def check_vllm(config: Config) -> None:
    """Raise ValueError where the flags of vLLM rollouts do not fit, each other or the rest."""
    vllm, engine = config.vllm, config.rollout.rollout_engine
    _check_timeout(config)
    if vllm.vllm_launch is not None:
        _check_launch(config)
    elif (engine == "vllm") != (vllm.vllm_url is not None):
        raise ValueError("--vllm-url and --rollout-engine vllm belong together")
    if engine != "vllm":
        return
    if config.model.hf_model is None:
        raise ValueError("--rollout-engine vllm needs --hf-model and --data")
    if vllm.vllm_launch is None:
        server_urls(config)
    read_api_key(config)
    if vllm.vllm_sync_dir is not None and not syncs_by_disk(config):
        raise ValueError(
            f"--vllm-sync-dir: --vllm-weight-sync {vllm.vllm_weight_sync} writes no files; leave "
            "one of the two out"
        )
    if vllm.vllm_weight_sync == "adapter" and not config.lora.lora_rank:
        raise ValueError(
            "--vllm-weight-sync adapter needs --lora-rank: without adapters the servers need whole "
            "checkpoints (--vllm-weight-sync checkpoint)"
        )
    if config.rollout.max_off_policy_steps and vllm.vllm_colocated:
        raise ValueError(
            "--vllm-colocated: servers and training take turns on the same GPUs, and "
            "--max-off-policy-steps lets them work at once; leave one of the two out"
        )
