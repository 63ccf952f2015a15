"""Jobs whose rollouts come from servers with vLLM's endpoints over transformers and peft models."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_phf.data.rollouts import read_sampled
from megatron_phf.demo.task import make_hf_directory, make_problems
from megatron_phf.runtime import parallel
from tests.end_to_end.test_bad_input import fails_once
from tests.fake_vllm import SHIFT, FakeVllm, load_model, sample
from tests.launch import torchrun, unmeasured
from tests.parallel.cases import launch

SCRIPT = "examples/pretrain_phf.sh"
BATCH, STEPS, SEED = 4, 3, 21
TEMPERATURE, TOP_P, TOP_K = 1.3, 0.9, 12


def save_with_large_weights(model: PreTrainedModel, path: Path) -> None:
    """Large enough that its tokens depend on them."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.12)
    model.save_pretrained(path)


def write_problems(directory: Path) -> None:
    """12 of the embedded task, and both templates."""
    (directory / "student.txt").write_text("{problem}=")
    (directory / "teacher.txt").write_text("{problem}|{solution}=")
    with open(directory / "problems.jsonl", "w") as f:
        for p in make_problems("train", 12, seed=3):
            line = {"problem": p.problem, "solution": p.solution, "answer": p.answer}
            f.write(json.dumps(line) + "\n")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A model whose tokens depend on its weights, and problems."""
    directory = tmp_path_factory.mktemp("vllm")
    make_hf_directory(str(directory / "hf"), seed=5)
    model = AutoModelForCausalLM.from_pretrained(directory / "hf")
    save_with_large_weights(model, directory / "hf")
    shutil.copytree(directory / "hf", directory / "served")
    write_problems(directory)
    return directory


def flags(files: Path, url: str, *more: str) -> list[str]:
    values = {
        "hf-model": files / "hf",
        "data": files / "problems.jsonl",
        "student-template": files / "student.txt",
        "teacher-template": files / "teacher.txt",
        "rollout-engine": "vllm",
        "vllm-url": url,
        "vllm-backoff-seconds": 0.1,
        "vllm-timeout-seconds": 20,
        "global-batch-size": BATCH,
        "micro-batch-size": 2,
        "train-iters": STEPS,
        "max-new-tokens": 10,
        "max-prompt-length": 128,
        "max-teacher-prompt-length": 200,
        "rollout-temperature": TEMPERATURE,
        "rollout-top-p": TOP_P,
        "rollout-top-k": TOP_K,
        "seed": SEED,
        "lr": 3e-2,
        "clip-grad": 1.0,
        "dtype": "fp32",
    }
    pairs = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    return [*pairs, "--no-tensorboard", "--no-progress", *more]


@pytest.fixture(scope="module")
def results(files: Path, tmp_path_factory) -> dict:
    """Both ways to bring the weights over, in one start of two processes."""
    output = tmp_path_factory.mktemp("results")
    # Trouble in step 1, a restart that loses the adapter in step 2, other numbers in step 3.
    faults = ["ok", "503", "truncated", "ok", "ok", "ok", "restart", "ok"]
    faults += ["ok", "ok", "ok", "ok"] + ["shifted_log_probs"] * BATCH
    with FakeVllm(str(files / "hf"), faults) as first, FakeVllm(str(files / "served")) as second:
        third = FakeVllm(str(files / "served"))
        adapter = flags(
            files, first.url, "--tensor-model-parallel-size", "2", "--lora-rank", "4",
            "--vllm-concurrency", "1", "--output-dir", str(output / "adapter"),
            "--record-rollouts", str(output / "rollouts.jsonl"),
        )  # fmt: skip
        checkpoint = flags(
            files, f"{second.url},{third.url}", "--vllm-sync-interval", "2",
            "--vllm-sync-dir", str(files / "served"), "--output-dir", str(output / "checkpoint"),
        )  # fmt: skip
        cases = {"adapter": adapter, "checkpoint": checkpoint}
        launch(2, [{"name": n, "kind": "job", "argv": a} for n, a in cases.items()], output)
        third.stop()
        metrics = {n: json.loads((output / f"{n}.json").read_text()) for n in cases}
        lines = (output / "rollouts.jsonl").read_text().splitlines()
        rollouts = [json.loads(line) for line in lines]
        return {**metrics, "rollouts": rollouts, "servers": (first, second, third), "at": output}


def test_adapters_follow_the_student_through_trouble_and_a_restart(results: dict) -> None:
    """The server samples with peft what the student computes in megatron, in each step anew."""
    server = results["servers"][0]
    drift = [step["rollout_drift"] for step in results["adapter"]]
    assert drift[0] < 1e-5 and drift[1] < 1e-5
    assert drift[2] == pytest.approx(SHIFT, abs=1e-4)
    warned = [step["rollout_drift_warning"] for step in results["adapter"]]
    assert warned == [False, False, True]
    loads = [b["lora_name"] for b in server.bodies("/v1/load_lora_adapter")]
    assert len(loads) == STEPS + 1 and len(set(loads)) == STEPS  # once more after the restart
    (name,) = server.adapters
    assert name == loads[-1] and name.endswith("-3")
    assert [p.name for p in (results["at"] / "adapter" / "vllm").iterdir()] == [name]
    assert {b["model"] for b in server.bodies("/v1/completions")} == set(loads)
    assert server.faults == []


def test_tokens_are_those_of_their_prompt_and_seed(results: dict, files: Path) -> None:
    """Step 1 has the model's own weights: transformers samples the same with the same seeds."""
    model = AutoModelForCausalLM.from_pretrained(files / "hf").eval()
    for i, rollout in enumerate(results["rollouts"][:BATCH]):
        body = {
            "prompt": rollout["student_prompt_ids"], "max_tokens": 10, "stop_token_ids": [1],
            "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": TOP_K,
            "seed": parallel.derived_seed("vllm", SEED, i),
        }  # fmt: skip
        with torch.no_grad():
            assert sample(model, body)[0] == rollout["response_ids"]
    prompts = [tuple(r["student_prompt_ids"]) for r in results["rollouts"]]
    assert len(results["rollouts"]) == BATCH * STEPS == len(set(prompts))


def test_checkpoints_are_reloaded_every_second_step(results: dict) -> None:
    """In step 2 the servers are one update behind; the step after they are not."""
    drift = [step["rollout_drift"] for step in results["checkpoint"]]
    assert drift[0] < 1e-5 and drift[2] < 1e-5
    assert drift[1] > 1e-2
    for server in results["servers"][1:]:
        asked = [path for path, _ in server.log if path != "/v1/completions"]
        assert asked == ["/collective_rpc", "/reset_prefix_cache"] * 2
        assert len(server.bodies("/v1/completions")) == BATCH * STEPS / 2


LONG, AHEAD = 6, 2
TRANSFER = ["--vllm-weight-sync", "torch_distributed", "--lr", "3e-2", "--train-iters"]


@pytest.fixture(scope="module")
def ahead(files: Path, tmp_path_factory) -> dict:
    """Rollouts of the next two steps beside training: with adapters straight and in two lives."""
    output = tmp_path_factory.mktemp("ahead")

    def case(name: str, server: FakeVllm, *more: str) -> dict:
        argv = flags(
            files, server.url, "--max-off-policy-steps", str(AHEAD), "--train-iters", str(LONG),
            "--output-dir", str(output / name), "--lr", "3e-3",
            "--record-rollouts", str(output / f"{name}.jsonl"), *more,
        )  # fmt: skip
        return {"name": name, "kind": "job", "argv": argv}

    with (
        FakeVllm(str(files / "hf")) as first,
        FakeVllm(str(files / "hf")) as second,
        FakeVllm(str(files / "hf"), transfer=True) as fourth,
        FakeVllm(str(files / "hf"), transfer=True) as fifth,
    ):
        third = FakeVllm(str(files / "served"))
        third_step = range(2 * BATCH, 3 * BATCH)
        fourth.held = {parallel.derived_seed("vllm", SEED, i): 2 for i in third_step}
        # Amid the second step's, once the first step is done: its responses are good.
        done = output / "lost" / "metrics.jsonl"
        last = parallel.derived_seed("vllm", SEED, 2 * BATCH - 1)
        fifth.dies = {last: lambda: done.is_file() and done.stat().st_size > 0}
        adapters = ["--lora-rank", "4", "--importance-ratio-cap", "1.02"]
        lives = [*adapters, "--save", str(output / "ckpt"), "--load", str(output / "ckpt")]
        lives += ["--record-rollouts", str(output / "lives.jsonl"), "--exit-interval", "3"]
        kept = [*TRANSFER, "4", "--exit-interval", "2"]
        kept += ["--save", str(output / "kept"), "--load", str(output / "kept")]
        cases = [
            case("straight", first, *adapters),
            case("life1", second, *lives),
            case("life2", second, *lives),
            case(
                "checkpoint", third, "--vllm-sync-dir", str(files / "served"),
                "--rollouts-per-problem", "2", "--keep-rollouts", "correct", "--grader", "exact",
            ),
            *(case(name, fourth, *kept) for name in ("kept1", "kept2")),
            case("lost", fifth, *TRANSFER, "3", "--max-off-policy-steps", "1"),
        ]  # fmt: skip
        launch(2, cases, output)
        third.stop()
    metrics = {c["name"]: json.loads((output / f"{c['name']}.json").read_text()) for c in cases}
    return {**metrics, "servers": (first, second, third, fourth, fifth), "at": output}


def steps_of(server: FakeVllm) -> list[tuple[int, str]]:
    """(step, version that its name says) of each request."""
    samples = {parallel.derived_seed("vllm", SEED, i): i for i in range(LONG * BATCH)}
    asked = server.bodies("/v1/completions")
    return sorted((samples[b["seed"]] // BATCH + 1, b["model"].rsplit("-", 1)[-1]) for b in asked)


def test_the_next_steps_are_sampled_by_the_weights_of_two_steps_before(ahead: dict) -> None:
    server = ahead["servers"][0]
    wanted = [(step, str(max(1, step - AHEAD))) for step in range(1, LONG + 1)]
    assert steps_of(server) == sorted(wanted * BATCH)
    ages = [step["rollout_staleness"] for step in ahead["straight"]]
    assert [(age["mean"], age["max"]) for age in ages] == [(0, 0), (1, 1), *[(2, 2)] * 4]
    for step in ahead["straight"]:
        assert step["seconds"]["rollout_wait"] > 0 <= step["seconds"]["rollout"]
        assert 0 <= step["rollout_overlap"] <= 1
    # On-policy tokens weigh 1; later ones are weighted, and cut at the cap.
    weights = [step["importance_weight"] for step in ahead["straight"]]
    assert weights[0] == pytest.approx(1, abs=1e-5) and ahead["straight"][0]["rollout_drift"] < 1e-5
    assert all(0.3 < weight < 0.99 for weight in weights[1:])
    assert all(0.1 < step["importance_clipped_fraction"] < 0.5 for step in ahead["straight"][1:])
    assert not any(step["rollout_drift_warning"] for step in ahead["straight"])
    # Adapters that nothing asks for any longer are gone, from the server and the disk.
    assert sorted(name.rsplit("-", 1)[-1] for name in server.adapters) == ["3", "4"]
    there = {p.name for p in (ahead["at"] / "straight" / "vllm").iterdir()}
    assert there == set(server.adapters)


def test_a_resumed_run_samples_nothing_again_and_loses_nothing(ahead: dict) -> None:
    """The checkpoint after step 3 has the rollouts of steps 4 and 5."""
    straight, lives = ahead["straight"], ahead["life1"] + ahead["life2"]
    assert [unmeasured(step) for step in lives] == [unmeasured(step) for step in straight]
    recorded = [(ahead["at"] / f"{name}.jsonl").read_text() for name in ("straight", "lives")]
    assert recorded[0] == recorded[1] and len(recorded[0].splitlines()) == LONG * BATCH
    assert steps_of(ahead["servers"][1]) == steps_of(ahead["servers"][0])


def test_whole_checkpoints_wait_for_the_requests_under_way(ahead: dict) -> None:
    """A server forgets its prefix cache where nothing runs: once each time, at once."""
    server = ahead["servers"][2]
    paths = [path for path, _ in server.log if path != "/v1/completions"]
    assert paths == ["/collective_rpc", "/reset_prefix_cache"] * (LONG - AHEAD)
    assert len(server.bodies("/v1/completions")) == LONG * BATCH
    assert all(step["rollout_staleness"]["max"] <= AHEAD for step in ahead["checkpoint"])
    # Two of each problem; of a random model none is correct, and nothing is trained on.
    prompts = [b["prompt"] for b in server.bodies("/v1/completions")]
    assert len({tuple(p) for p in prompts}) == LONG * BATCH / 2
    assert [step["rollouts_kept"] for step in ahead["checkpoint"]] == [0] * LONG
    assert all(math.isnan(step["loss"]) for step in ahead["checkpoint"])


def sampled_again(files: Path, server: FakeVllm, number: int, begun: int, ended: int) -> list[int]:
    """A sample whose first two tokens are by the weights of step ``begun``, the rest by others."""
    models = [load_model(str(files / "hf")) for _ in range(2)]
    for model, version in zip(models, (begun, ended), strict=True):
        model.load_state_dict(server.transfers[version - 1])
    (body,) = [
        body
        for body in server.bodies("/v1/completions")
        if body["seed"] == parallel.derived_seed("vllm", SEED, number)
    ]
    with torch.no_grad():
        return sample(lambda ids: models[ids.shape[1] >= len(body["prompt"]) + 2](ids), body)[0]


def test_weights_without_a_disk_come_amid_responses_which_say_so(ahead: dict, files: Path) -> None:
    """Step 3's have two tokens when the weights of step 2 come, and go on with them."""
    server, path = ahead["servers"][3], ahead["at"] / "kept" / "iter_0000002" / "rollouts.jsonl"
    kept = read_sampled(str(path))
    versions = {
        step: {(r.policy_version, r.policy_version_end) for r in rollouts}
        for step, rollouts in kept.items()
    }
    assert versions == {3: {(1, 2)}, 4: {(2, None)}}
    for step, begun in ((3, 1), (4, 2)):
        for number, rollout in enumerate(kept[step], start=(step - 1) * BATCH):
            again = sampled_again(files, server, number, begun, 2)
            assert again == list(rollout.response_ids)
    spanned = [sampled_again(files, server, n, 1, 1) for n in range(2 * BATCH, 3 * BATCH)]
    assert spanned != [list(r.response_ids) for r in kept[3]]  # the new weights matter


def test_a_resumed_run_asks_nothing_of_what_it_has(ahead: dict) -> None:
    """The second life has all that it trains on: neither weights nor prompts go to the server."""
    server = ahead["servers"][3]
    paths = [path for path, _ in server.log if path.startswith(("/pause", "/resume"))]
    assert paths == ["/pause?mode=keep&clear_cache=true", "/resume"] * 2
    assert len(server.bodies("/v1/completions")) == 4 * BATCH
    steps = ahead["kept1"] + ahead["kept2"]
    ages = [step["rollout_staleness"] for step in steps]
    assert [(age["mean"], age["max"], age["ended"]) for age in ages] == [
        (0, 0, 0), (1, 1, 1), (2, 2, 1), (2, 2, 2)
    ]  # fmt: skip
    assert steps[0]["rollout_drift"] < 1e-5 < 1e-2 < steps[2]["rollout_drift"]


def test_a_server_that_lost_its_weights_beside_training_gets_them_again(ahead: dict) -> None:
    """It is restarted with the first weights amid step 2's rollouts: those are sampled anew."""
    server, steps = ahead["servers"][4], ahead["lost"]
    assert steps[0]["rollout_drift"] < 1e-5 and steps[1]["rollout_drift"] < 1e-5
    assert [step["rollout_staleness"]["max"] for step in steps] == [0, 0, 1]
    first, again, handed_over = server.transfers
    assert all(torch.equal(again[name], handed_over[name]) for name in again)
    assert not all(torch.equal(again[name], first[name]) for name in again)
    assert {path for path, _ in server.log if path.startswith("/pause")} == {
        "/pause?mode=wait&clear_cache=true"
    }


def test_a_request_for_ever_refused_ends_all_ranks_with_one_error(files: Path, tmp_path) -> None:
    with FakeVllm(str(files / "served"), ["ok", "ok", "ok", "400"]) as server:
        more = ["--vllm-sync-dir", str(files / "served"), "--output-dir", str(tmp_path)]
        done = torchrun(2, SCRIPT, *flags(files, server.url, *more), timeout=300)
    fails_once(done, f"--vllm-url {server.url}: POST /v1/completions: status 400: 'scripted troubl")
