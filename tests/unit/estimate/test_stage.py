"""What a pipeline stage holds, by hand."""

from __future__ import annotations

import pytest

from megatron_phf.config.settings import Config
from megatron_phf.estimate.activations import Machine
from megatron_phf.estimate.memory import phase_estimates
from megatron_phf.estimate.stage import (
    adapter_parameters,
    layers_of_stages,
    stage_parameters,
)
from megatron_phf.model.architecture import Architecture, parse_architecture
from megatron_phf.teacher.architecture import Models
from tests.simulate.cases import EXPERTS, MODEL

GIB = 2**30
TABLE = 32000 * 1024  # rows of the embedding, and of the head
LAYER = 1024 * 128 * (2 * 16 + 2 * 4) + 3 * 1024 * 3072 + 2 * 1024 + 2 * 128


def arch(**more: object) -> Architecture:
    return parse_architecture({**MODEL, **more}, "here")


@pytest.mark.parametrize(
    ("layers", "settings", "stages"),
    [
        (8, {}, [2, 2, 2, 2]),
        (7, {"num_layers_in_first_pipeline_stage": 1}, [1, 2, 2, 2]),
        (9, {"num_layers_in_last_pipeline_stage": 3}, [2, 2, 2, 3]),
        (7, {"account_for_embedding_in_pipeline_split": True}, [1, 2, 2, 2]),
        (6, {"account_for_embedding_in_pipeline_split": True,
             "account_for_loss_in_pipeline_split": True}, [1, 2, 2, 1]),
    ],
)  # fmt: skip
def test_layers(layers: int, settings: dict, stages: list[int]) -> None:
    config = Config().replaced(pipeline_model_parallel_size=4, **settings)
    assert layers_of_stages(layers, config.parallel) == stages


def test_the_first_and_the_last_stage_hold_embedding_and_head_whole() -> None:
    """12 stages would divide them by 12, and say a sixth of what is there."""
    config = Config().replaced(pipeline_model_parallel_size=4)
    found = [stage_parameters(arch(), config, stage).total for stage in range(4)]
    assert found == [LAYER + TABLE, LAYER, LAYER, LAYER + TABLE + 1024]
    tied = arch(tie_word_embeddings=True)
    assert [stage_parameters(tied, config, stage).total for stage in range(4)] == found
    assert stage_parameters(tied, Config(), 0).total == 4 * LAYER + TABLE + 1024
    assert stage_parameters(arch(), Config(), 0).total == arch().num_parameters()


def test_experts_and_adapters_by_hand() -> None:
    config = Config().replaced(tensor_model_parallel_size=2, expert_model_parallel_size=4)
    found = stage_parameters(parse_architecture(EXPERTS, "here"), config, 0)
    assert found.experts == 2 * 4 * 3 * 1024 * 768 / 2
    lora = Config().replaced(tensor_model_parallel_size=2, lora_rank=8)
    assert lora.lora.lora_target_modules.count(",") == 6
    queries, keys, ffn = 1024, 256, 1536  # of a rank
    columns = 5 * 1024 + queries + 2 * keys + 2 * ffn
    rows = 2 * 1024 + queries + ffn
    assert adapter_parameters(arch(), lora, 0) == 4 * 8 * (columns + rows)


def test_an_offloaded_average_is_not_on_the_device() -> None:
    """It is kept on the host, and so is the teacher but in its pass; its head until the loss."""
    config = Config().replaced(teacher="ema", use_distributed_optimizer=True)
    away = config.replaced(teacher_offload=True)
    models, machine = Models(arch()), Machine(2, 2)
    here, there = (phase_estimates(models, c, machine, 512, 0) for c in (config, away))
    n = arch().num_parameters()
    assert here["student"]["teacher"] * GIB == 6 * n
    assert there["student"]["teacher"] * GIB == 2 * TABLE
    assert there["teacher"]["teacher"] * GIB == 2 * n
    assert there["optimizer"]["teacher"] == 0
    assert "teacher update" not in there
    assert (here["teacher update"]["teacher"] - here["optimizer"]["teacher"]) * GIB == 4 * TABLE
    # The build has the weights twice, where they go into DDP's buffers.
    assert sum(there["build"].values()) * GIB == 8 * n
