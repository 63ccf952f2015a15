"""Of losses, windows and shares of a mean; what the teacher is shown; signs of collapse."""

from __future__ import annotations

from tests.breakages.breakage import Breakage

PARITY = "tests/parallel/test_parity.py"
LARGER = "tests/parallel/test_teacher_model.py"

LOSSES = (
    Breakage(
        "layers left out of the flow loss still count in its mean",
        "megatron_phf/hidden/spec.py",
        "/ max(sum(counted), 1)",
        "/ len(counted)",
        (PARITY, "-k", "test_equals_reference and geometry"),
    ),
    Breakage(
        "pointwise matching divides by the transitions",
        "megatron_phf/hidden/term.py",
        "valid.sum(-1) - (self.span - 1)",
        "valid.sum(-1) - 1",
        (PARITY, "-k", "test_equals_reference and pointwise"),
    ),
    Breakage(
        "the last layer's targets are those of each layer",
        "megatron_phf/hidden/tap.py",
        '"last": [last] * len(layer_map)',
        '"last": layer_map',
        (PARITY, "-k", "test_equals_reference and last_layer_pp4"),
    ),
    Breakage(
        "the supervised loss is weighted as the policy gradient",
        "megatron_phf/losses/objectives.py",
        "lambda log_s, log_t: log_s.new_ones(())",
        "lambda log_s, log_t: log_t - log_s",
        (PARITY, "-k", "test_equals_reference and supervised"),
    ),
    Breakage(
        "no adjacent term on the first layer of a pipeline stage",
        "megatron_phf/hidden/loss.py",
        "and layer == 1:",
        "and layer in (1, 3):",  # of 4 layers at PP 2
        (PARITY, "-k", "test_equals_reference and llama_pp2"),
    ),
    Breakage(
        "the flow loss forgets the number of microbatches",
        "megatron_phf/train/student_pass.py",
        "flow_scale = self._config.method.phf_alpha * averaged / max(num_sequences, 1)",
        "flow_scale = self._config.method.phf_alpha * averaged * len(batches) / num_sequences",
        (PARITY, "-k", "test_equals_reference and pp2_full_two"),
    ),
    Breakage(
        "the output loss forgets the number of microbatches",
        "megatron_phf/train/student_pass.py",
        "opsd_weight * replicas * len(batches) / max(num_tokens, 1)",
        "opsd_weight * replicas / num_tokens",
        (PARITY, "-k", "test_equals_reference and pp2_full_two"),
    ),
    Breakage(
        "the hidden states' loss does not see the tokens' weights",
        "megatron_phf/train/batch.py",
        "FlowWindow(b.window, b.window_valid, scale, w)",
        "FlowWindow(b.window, b.window_valid, scale, None)",
        (PARITY, "-k", "test_equals_reference and position_pp2_vpp2"),
    ),
    Breakage(
        "context ranks know the statistics of their own tokens alone",
        "megatron_phf/train/token_weights.py",
        "if found and self._shards.context is not None:",
        "if False:",
        (PARITY, "-k", "test_equals_reference and divergence_packed_cp2"),
    ),
    Breakage(
        "a tool's output is scored",
        "megatron_phf/data/rollouts.py",
        "        return self.response_mask\n",
        "        return (True,) * len(self.response_mask)\n",
        (PARITY, "-k", "test_equals_reference and masked_packed_cp2"),
    ),
    Breakage(
        "the window counts tokens that the student did not write",
        "megatron_phf/data/batch.py",
        "return order.gather(1, positions).masked_fill(~valid, 0), valid",
        "return positions, valid",
        (PARITY, "-k", "test_equals_reference and masked_packed_cp2"),
    ),
    Breakage(
        "the window is off by one",
        "megatron_phf/data/batch.py",
        "responses + positions, valid",
        "responses + positions - 1, valid",
        (PARITY, "-k", "test_equals_reference and one]"),
    ),
    Breakage(
        "logits are off by one token",
        "megatron_phf/data/batch.py",
        "responses - 1 + generated",
        "responses + generated",
        (PARITY, "-k", "test_equals_reference and one]"),
    ),
    Breakage(
        "data-parallel ranks average instead of sharing a mean",
        "megatron_phf/train/student_pass.py",
        "replicas = parallel.data_parallel_size()",
        "replicas = 1",
        (PARITY, "-k", "test_equals_reference and empty_dp2 and not pp2 and not tp2"),
    ),
    Breakage(
        "relative depth rounds down",
        "megatron_phf/hidden/layer_map.py",
        "2 * layer * teacher_layers + student_layers",
        "2 * layer * teacher_layers",
        (LARGER, "-k", "tall] or deep] or shallow]"),
    ),
    Breakage(
        "an absent direction term halves the geometry term",
        "megatron_phf/hidden/spec.py",
        "half / over.count(term.over)",
        "half / (2 if term.over == 'layer' else 1)",
        (LARGER, "-k", "tall] or deep] or shallow]"),
    ),
    Breakage(
        "padding that only the student has takes part",
        "megatron_phf/train/student_pass.py",
        "OutputHead(models.vocab_size,",
        "OutputHead(models.student.vocab_size,",
        (LARGER, "-k", "tall] or deep] or shallow]"),
    ),
    Breakage(
        "a stage unpacks microbatches in another order than they were sent",
        "megatron_phf/hidden/targets.py",
        "extend((i, move.item) for i in numbers)",
        "extend((i, move.item) for i in reversed(numbers))",
        (LARGER, "-k", "deep_pp2_late or deep_pp2_apart"),
    ),
    Breakage(
        "a chunk's logits live on beside the next chunk's",
        "megatron_phf/losses/chunked.py",
        "            del d_logits",
        "            #",
        ("tests/unit/losses/test_divergence.py", "-k", "no_more_than_two"),
    ),
    Breakage(
        "a recomputed layer takes the directions of another piece's graph for its input's",
        "megatron_phf/hidden/compare.py",
        "if self._last is not None and self._last[0] is inputs:",
        "if self._last is not None:",
        (PARITY, "-k", "test_equals_reference and full"),
    ),
    Breakage(
        "some problems are their own other problem",
        "megatron_phf/data/privileged.py",
        "[*order[1:], *order[:1]]",
        "order",
        ("tests/unit/data/test_privileged.py", "-k", "never_ones_own"),
    ),
    Breakage(
        "a resumed run forgets the level of its first steps",
        "megatron_phf/train/collapse.py",
        'state.get("first", {})',
        "{}",
        ("tests/unit/train/test_collapse.py", "-k", "resumed_run"),
    ),
    Breakage(
        "a checkpoint of a collapsed student is written",
        "megatron_phf/train/session.py",
        "if self._signs.fired is not None",
        "if False",
        ("tests/unit/train/test_collapse.py", "-k", "no_checkpoint"),
    ),
)
